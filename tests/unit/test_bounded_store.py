"""A store whose keeper stands still, or loses its connections, against a real one in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist

from triptych.launch.faults.places import places_of_threads
from triptych.launch.nodes.bounded_store import BoundedStore

KEEPER = """
import sys, threading, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("up", flush=True)
threading.Event().wait()
"""


@contextmanager
def keeper(port: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", KEEPER, str(port)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bounded(port: int, seconds: float) -> BoundedStore:
    client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    return BoundedStore(dist.PrefixStore("beside", client), seconds)


def test_it_is_the_store(port: int) -> None:
    with keeper(port):
        store, other = bounded(port, 20), bounded(port, 20)
        assert not other.check("a")
        store.set("a", "1")
        store.compare_set("a", "2", "3")
        store.compare_set("b", "", "4")
        assert other.check("a") and other.get("a") == "1" and other.multi_get(["b", "a"]) == ["4", "1"]


def test_its_thread_is_no_place_where_something_hangs(port: int) -> None:
    with keeper(port):
        bounded(port, 20).set("a", "1")
        assert "bounded_store" not in places_of_threads()


def test_who_gets_no_answer_is_not_held_and_goes_on_when_there_is_one(port: int) -> None:
    with keeper(port) as process:
        store = bounded(port, 0.5)
        store.set("a", "1")
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        store.set("a", "2")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"gave no answer for 0\.5 s"):
                store.check("a")
        assert time.monotonic() - began < 10
        process.send_signal(signal.SIGCONT)
        store.seconds = 20
        assert store.get("a") == "2"


def test_an_error_of_the_caller_leaves_it_serving(port: int) -> None:
    with keeper(port):
        store = bounded(port, 20)
        with pytest.raises(TypeError):
            store.set("a", 1)  # type: ignore[arg-type]
        store.set("a", "1")
        assert store.get("a") == "1"


def test_a_lost_connection_is_made_anew(port: int) -> None:
    with keeper(port):
        store = bounded(port, 20)
        store.set("a", "1")
    with pytest.raises(RuntimeError):
        store.get("a")
    with keeper(port):
        store.set("a", "2")
        assert store.get("a") == "2"


WAITING = """
import os, signal, sys, time, torch.distributed as dist
from triptych.launch.distributed import run_rank
from triptych.launch.nodes.bounded_store import BoundedStore

def work():
    keeper, seconds = int(sys.argv[2]), float(sys.argv[3])
    store = BoundedStore(dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False), 0.1)
    os.kill(keeper, signal.SIGSTOP)
    try:
        store.check("a")
    except RuntimeError as error:
        print(error)
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(keeper, signal.SIGCONT)
        os._exit(0)

run_rank(work)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 1.0])
def test_a_rank_ends_that_waits_for_an_answer_whenever_it_comes(port: int, seconds: float) -> None:
    with keeper(port) as process:
        command = [sys.executable, "-c", WAITING, str(port), str(process.pid), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "the store where ranks met gave no answer for 0.1 s\n"), done.stderr
