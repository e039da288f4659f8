"""A store whose keeper stands still, or loses its connections, against a real one in a process of its own."""

from __future__ import annotations

import os
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


def stand_still(process: subprocess.Popen[bytes]) -> None:
    """Returns when all of its threads do."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


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
        stand_still(process)
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
import sys, torch.distributed as dist
from triptych.launch.distributed import run_rank
from triptych.launch.nodes.bounded_store import BoundedStore

def work():
    store = BoundedStore(dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False), 0.1)
    print("connected", flush=True)
    sys.stdin.readline()
    try:
        store.check("a")
    except RuntimeError as error:
        print(error, flush=True)

run_rank(work)
"""


@pytest.mark.parametrize("seconds", [0.2, 0.4, 0.6])  # the interpreter ends by then
def test_a_rank_ends_that_waits_for_an_answer_whenever_it_comes(port: int, seconds: float) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with keeper(port) as process, subprocess.Popen([sys.executable, "-c", WAITING, str(port)], **pipes) as rank:  # type: ignore[call-overload]
        assert rank.stdout.readline() == "connected\n"
        stand_still(process)
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "the store where ranks met gave no answer for 0.1 s\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        out, err = rank.communicate(timeout=60)
        assert rank.returncode == 0 and not out, err
