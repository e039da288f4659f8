"""Ranks that wait for one that failed are told, and what earlier attempts left in the store tells nobody."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from triptych.launch.faults import meeting
from triptych.launch.nodes import early_words
from triptych.launch.nodes.early_words import Listener, Told, Words, tell


def wait(store: dist.Store, seconds: float) -> str | None:
    """As a rank that waits for others; what it was told."""
    listener, deadline = Listener(store), time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            listener.listen()
            time.sleep(0.01)
    except Told as told:
        return str(told)
    return None


def test_all_that_wait_are_told_and_leave_together() -> None:
    store = dist.HashStore()
    ends: list[float] = []

    def late(seconds: float) -> str | None:
        time.sleep(seconds)
        told = wait(store, 20)
        ends.append(time.monotonic())
        return told

    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(late, seconds) for seconds in (0.0, 0.3, 2.0)]
        began = time.monotonic()
        threads.submit(tell, store, "no recipe", 3, 30.0).result()
        assert time.monotonic() - began > 2.0, "who tells stays until the last has heard it"
        assert [each.result() for each in waiting] == ["no recipe"] * 3
    assert max(ends) - min(ends) < 1.0


def test_of_several_that_fail_one_tells() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as threads:
        telling = [threads.submit(tell, store, f"failure {number}", 3, 30.0) for number in range(3)]
        told = threads.submit(wait, store, 20)
        assert str(told.result()).startswith("failure ")
        for each in telling:
            each.result(10)


def test_words_of_the_dead_tell_nobody_and_are_replaced() -> None:
    store = dist.HashStore()
    for is_over in (False, True):
        store.set(early_words._WORDS, _written(Words("dead", 7, "old", is_over)))
        assert wait(store, 2.0) is None
        with ThreadPoolExecutor(2) as threads:
            telling = threads.submit(tell, store, "new", 1, 30.0)
            assert wait(store, 20) == "new"
            telling.result(10)


def _written(words: Words) -> str:
    return json.dumps(words)


def test_patience_with_ranks_that_never_come_has_an_end() -> None:
    store = dist.HashStore()
    began = time.monotonic()
    tell(store, "alone", 5, 0.5)
    assert 0.5 <= time.monotonic() - began < 3
    assert wait(store, 1.5) is None, "those that come later are of another attempt, or wait as before"


def test_who_tells_dies_while_others_stay() -> None:
    store = dist.HashStore()
    counting = threading.Event()

    def counts_for_a_while() -> None:
        for count in range(15):
            store.set(early_words._WORDS, _written(Words("dying", count, "cause")))
            counting.wait(0.1)

    threading.Thread(target=counts_for_a_while).start()
    began = time.monotonic()
    assert wait(store, 20) == "cause"
    assert time.monotonic() - began < early_words.SILENCE_S + 4


@pytest.mark.parametrize("is_first", [True, False])
def test_ranks_that_meet_listen(is_first: bool) -> None:
    store = dist.HashStore()
    deadline = time.monotonic() + 20

    def come() -> Any:
        return meeting._call(store, 3, deadline, 20.0) if is_first else meeting._answer(store, 1, deadline, 20.0)

    with ThreadPoolExecutor(2) as threads:
        coming = threads.submit(come)
        threads.submit(tell, store, "cause", 1, 10.0)
        with pytest.raises(Told, match="cause"):
            coming.result()


def test_without_a_store_or_other_nodes_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_words, "_others_wait", True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not early_words.is_waited_for()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert early_words.is_waited_for()
    monkeypatch.setattr(early_words, "_CONNECT_S", 0.5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "9")
    began = time.monotonic()
    early_words.tell_waiting("cause")
    assert time.monotonic() - began < 10
    assert not early_words.is_waited_for()
