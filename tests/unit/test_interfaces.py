"""Which address others reach a host by, which interface that is, and what the user said himself."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from triptych.datasets.schema import InputError
from triptych.launch.nodes import interfaces as interfaces_module
from triptych.launch.nodes.interfaces import (
    GLOO,
    LOCAL_ADDRESS,
    NCCL,
    RENDEZVOUS_SETTINGS,
    Route,
    check_interfaces,
    choose_interface,
    interfaces,
    own_address,
    route_to,
    torchrun_settings,
)

STORE = ["10.0.0.1", "192.168.5.1", "fd00::1"]
"""The addresses of the host that keeps the store, besides loopback."""


class TestOwnAddress:
    @given(st.sampled_from(STORE), st.integers(2, 200), st.lists(st.sampled_from(["127.0.0.1", "127.0.1.1", "::1", *STORE]), max_size=4))
    def test_the_ends_of_connections_between_hosts(self, reached: str, number: int, locals_: list[str]) -> None:
        """However the store's host finds itself, it takes the address that others use, and they the one they come from."""
        there = Route(f"{reached[:-1]}{number}" if ":" not in reached else f"fd00::{number:x}", reached)
        here = [Route(address, address) for address in locals_]
        for route in here:
            assert own_address(route, [*here, there], {"127.0.0.1", "::1", *STORE}) == reached
        assert own_address(there, [], {there.local, "127.0.0.1"}) == there.local

    def test_all_on_the_host_of_the_store(self) -> None:
        assert own_address(Route("10.0.0.1", "10.0.0.1"), [Route("10.0.0.1", "10.0.0.1")], {"10.0.0.1"}) == "10.0.0.1"
        assert own_address(Route("127.0.0.1", "127.0.1.1"), [Route("127.0.0.1", "127.0.1.1")], {"127.0.0.1"}) is None

    def test_an_address_that_is_translated_on_the_way_is_not_taken_for_one_of_this_host(self) -> None:
        others = [Route("10.9.0.2", "34.1.2.3")]
        assert own_address(Route("127.0.0.1", "127.0.0.1"), others, {"10.9.0.1"}) is None
        assert own_address(Route("10.9.0.1", "34.1.2.3"), others, {"10.9.0.1"}) == "10.9.0.1"


def test_interfaces_are_the_kernels() -> None:
    found = interfaces()
    assert set(found) <= {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1" in found["lo"]


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A store's place in the environment, on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        for variable in (GLOO, NCCL):
            monkeypatch.setenv(variable, "")  # so that it is restored
            os.environ.pop(variable)
        yield server


def test_a_route_is_that_of_a_connection(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    threading.Thread(target=listening.accept, daemon=True).start()
    assert route_to("localhost", port, 5.0) == Route("127.0.0.1", "127.0.0.1")
    with pytest.raises(OSError):
        route_to("256.0.0.1", port, 5.0)


def test_the_interface_that_others_reach_is_set_and_the_users_stays(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host's rank says that it reached this one by 127.0.0.1, as by any address of an interface here."""
    store = dist.HashStore()
    store.set("route/1", '["10.1.2.3", "127.0.0.1"]')
    assert choose_interface(store, 0, 2, 5.0) is None, "loopback is no way between hosts"
    assert GLOO not in os.environ
    addresses = [(name, each) for name, found in interfaces().items() for each in found if name != "lo" and "%" not in each]
    for name, address in addresses:
        store.set("route/1", f'["203.0.113.9", "{address}"]')
        assert choose_interface(store, 0, 2, 5.0) == name
        assert (os.environ.pop(GLOO), os.environ.pop(NCCL)) == (name, f"={name}")
        monkeypatch.setenv(GLOO, "mine")
        assert choose_interface(store, 0, 2, 5.0) == name
        assert (os.environ.pop(GLOO), os.environ.pop(NCCL)) == ("mine", f"={name}")


@pytest.mark.parametrize(
    ("settings", "named"),
    [({GLOO: "ib0"}, f"{GLOO}=ib0"), ({GLOO: "lo,ib1"}, "no interface ib1"), ({NCCL: "=ib2"}, f"{NCCL}==ib2")],
)
def test_an_interface_that_is_not_there(settings: Mapping[str, str], named: str) -> None:
    with pytest.raises(InputError) as error:
        check_interfaces(settings)
    assert named in str(error.value) and "there are" in str(error.value) and "lo" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{}, {GLOO: "lo"}, {NCCL: "=lo"}, {NCCL: "eth,ib"}, {NCCL: "^docker"}])
def test_settings_that_can_be(settings: Mapping[str, str]) -> None:
    check_interfaces(settings)


class TestTorchrun:
    def test_one_host_is_left_alone(self) -> None:
        assert torchrun_settings("localhost:0", {}) == {}

    @pytest.mark.parametrize("thinks", [True, False, None])
    def test_the_host_of_the_endpoint_keeps_the_rendezvous_under_the_name_that_others_use(
        self, monkeypatch: pytest.MonkeyPatch, thinks: bool | None
    ) -> None:
        monkeypatch.setattr(interfaces_module, "_torchrun_takes_for_own", lambda host: thinks)
        settings = {} if thinks else {RENDEZVOUS_SETTINGS: "is_host=1"}
        assert torchrun_settings("127.0.1.1:29500", {}) == {LOCAL_ADDRESS: "127.0.1.1", **settings}

    def test_the_users_settings_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(interfaces_module, "_torchrun_takes_for_own", lambda host: None)
        settings = {LOCAL_ADDRESS: "10.0.0.9", RENDEZVOUS_SETTINGS: "read_timeout=90"}
        assert torchrun_settings("127.0.1.1:29500", settings) == {RENDEZVOUS_SETTINGS: "read_timeout=90,is_host=1"}
        assert torchrun_settings("127.0.1.1:29500", {LOCAL_ADDRESS: "10.0.0.9", RENDEZVOUS_SETTINGS: "is_host=0"}) == {}

    def test_a_name_that_is_none(self) -> None:
        with pytest.raises(InputError, match=r"rendezvous endpoint no\.such\.host\.invalid: .* cannot reach it"):
            torchrun_settings("no.such.host.invalid:29500", {})
