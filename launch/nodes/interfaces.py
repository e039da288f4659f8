"""Which network interface a node's ranks use, where the user did not say: the one by which the nodes already reach each other.

gloo would take the address that the host's own name resolves to: often 127.0.1.1, or a bridge that no other host can reach. nccl would take
the first interface that is up.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psutil
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

from ...datasets.schema import InputError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
LOCAL_ADDRESS, RENDEZVOUS_SETTINGS = "PET_LOCAL_ADDR", "PET_RDZV_CONF"
"""torchrun's --local-addr and --rdzv-conf, as environment variables."""


class Route(NamedTuple):
    """The two ends of a connection to the store where ranks meet."""

    local: str
    store: str

    @property
    def stays_on_host(self) -> bool:
        return self.local == self.store or _is_loopback(self.store)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interfaces() -> dict[str, list[str]]:
    """The IP addresses of this host's interfaces, by name; none where an interface has none."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {name: [each.address for each in found if each.family in families] for name, found in psutil.net_if_addrs().items()}


def route_to(host: str, port: int, timeout_s: float) -> Route:
    """By which addresses a connection is made. Raises OSError if there is none."""
    with socket.create_connection((host, port), timeout_s) as connection:
        return Route(connection.getsockname()[0], connection.getpeername()[0])


def own_address(own: Route, others: Sequence[Route], addresses: set[str]) -> str | None:
    """By which address other hosts reach this one; None if it cannot be known.

    Args:
        own: to the store.
        others: of all ranks; read where the store is on this host.
        addresses: that this host has.
    """
    if not own.stays_on_host:
        return own.local
    reached = [route.store for route in others if not route.stays_on_host and route.store in addresses]
    return reached[0] if reached else None if _is_loopback(own.store) else own.store


def choose_interface(store: Any, rank: int, world_size: int, timeout_s: float) -> str | None:
    """Have gloo and nccl use the interface by which the hosts of all ranks reach each other; the user's settings stay. Collective.

    Args:
        store: of these ranks alone.
    Returns:
        The interface; None if it cannot be known, and nothing was set.
    """
    own = route_to(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout_s)
    store.set(f"route/{rank}", json.dumps(own))
    keys = [f"route/{other}" for other in range(world_size)]
    others = [Route(*json.loads(route)) for route in store.multi_get(keys)] if own.stays_on_host else []
    names = {address: name for name, addresses in interfaces().items() for address in addresses}
    address = own_address(own, others, set(names))
    chosen = names.get(address) if address else None
    if chosen is not None:
        os.environ.setdefault(GLOO, chosen)
        os.environ.setdefault(NCCL, f"={chosen}")  # without = it is the beginning of a name
    return chosen


def check_interfaces(settings: Mapping[str, str] = os.environ) -> None:
    """Raises InputError where the user named an interface that this host does not have."""
    there = interfaces()
    named = {GLOO: settings.get(GLOO, "").split(",")}
    if settings.get(NCCL, "").startswith("="):
        named[NCCL] = settings[NCCL][1:].split(",")
    for variable, names in named.items():
        for name in names:
            if name and name not in there:
                listed = ", ".join(sorted(there))
                raise InputError(f"{variable}={settings[variable]}: there is no interface {name}; there are {listed}")


def torchrun_settings(endpoint: str, settings: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the torchrun of this node needs to be told so that it need not resolve its host's own name, if the user did not tell it.

    torchrun gives the host's own name, as it resolves there, to all nodes as the place of their store; and it finds out by that name
    whether it is to keep the rendezvous. Where the name resolves to loopback, or to nothing, both go wrong.

    Args:
        endpoint: of the rendezvous, host:port.
    Returns:
        Environment variables.
    Raises:
        InputError: the endpoint's host cannot be resolved.
    """
    host = endpoint.rpartition(":")[0] or endpoint
    route = _route_without_packets(host)
    if _is_loopback(route.store) and host == "localhost":
        return {}
    # Others reach the endpoint's host by this name, whatever it resolves to there.
    found = {LOCAL_ADDRESS: host if route.stays_on_host else route.local}
    # Only where it would err: where it finds this out itself, it allows for several nodes on one host.
    if "is_host" not in settings.get(RENDEZVOUS_SETTINGS, "") and _torchrun_takes_for_own(host) is not route.stays_on_host:
        before = settings.get(RENDEZVOUS_SETTINGS)
        found[RENDEZVOUS_SETTINGS] = ",".join([*([before] if before else []), f"is_host={int(route.stays_on_host)}"])
    return {name: value for name, value in found.items() if name == RENDEZVOUS_SETTINGS or name not in settings}


def _torchrun_takes_for_own(host: str) -> bool | None:
    """Whether torchrun thinks that this is the host; None where it fails over it."""
    try:
        return _matches_machine_hostname(host)
    except OSError:  # this host's own name does not resolve
        return None


def _route_without_packets(host: str) -> Route:
    """As the kernel would choose it: nobody need listen there yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return Route(probe.getsockname()[0], probe.getpeername()[0])
    except OSError as error:
        raise InputError(f"rendezvous endpoint {host}: {socket.gethostname()} cannot reach it ({error.strerror or error})") from error
