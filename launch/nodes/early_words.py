"""A rank that fails before the ranks met tells those that wait for it.

Its words lie in torchrun's store, which may hold words of earlier attempts. So it stays until all others have heard it, and counts
meanwhile: words are of this attempt if their count goes on. Those that heard stay as long as it does: torchrun ends all ranks of a node
when one has ended, and some might not have heard yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from datetime import timedelta
from typing import Any, NamedTuple

PATIENCE_S = 120.0
"""How long ranks may take to come. One that does not, has died."""
SILENCE_S = 5.0
"""After so long without counting, whoever left words is dead."""
_CONNECT_S = 10.0
_SECONDS_BETWEEN_COUNTS = 0.1
_SECONDS_BETWEEN_LOOKS = 0.5
_WORDS = "early words"
_others_wait = True


class Words(NamedTuple):
    name: str
    """Of the rank's process."""
    beats: int
    text: str
    is_over: bool = False

    @property
    def key(self) -> str:
        return f"{_WORDS}/{self.name}"


class Told(RuntimeError):
    """Another rank failed, and these are its words."""


def connect(timeout_s: float) -> Any:
    """The store that torchrun keeps, or the first rank. Raises torch.distributed.DistError if nobody does."""
    import torch.distributed as dist  # ranks say why they end before they import it, too

    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


def meeting_begins() -> None:
    """From now on this rank is not waited for."""
    global _others_wait
    _others_wait = False


def is_waited_for() -> bool:
    """Whether this rank, of one of several nodes, did not go to the meeting yet. On one node torchrun ends all ranks."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return _others_wait and world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def tell_waiting(text: str) -> None:
    """Unless this rank went to the meeting: tell all others, as far as they come and the store is there. Of several such, one tells."""
    if is_waited_for():
        meeting_begins()
        with contextlib.suppress(RuntimeError, ValueError):  # nobody keeps a store
            tell(connect(_CONNECT_S), text, int(os.environ["WORLD_SIZE"]) - 1, PATIENCE_S)


def tell(store: Any, text: str, others: int, patience_s: float) -> None:
    """As tell_waiting, in this store. Returns when `others` ranks have heard, or heard another that tells."""
    own = Words(uuid.uuid4().hex, 0, text)
    while True:
        before = _read(store)
        if before is not None and _goes_on(store, before):
            stay(store, before)
            return
        expected = json.dumps(before) if before else ""
        if store.compare_set(_WORDS, expected, json.dumps(own)).decode() == json.dumps(own):
            break
    deadline = time.monotonic() + patience_s
    while store.add(own.key, 0) < others and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_COUNTS)
        own = own._replace(beats=own.beats + 1)
        store.set(_WORDS, json.dumps(own))
    store.set(_WORDS, json.dumps(own._replace(is_over=True)))


def stay(store: Any, words: Words) -> None:
    """Let who tells know that this rank heard it, and wait for its end."""
    with contextlib.suppress(RuntimeError):  # whoever kept the store is gone
        store.add(words.key, 1)
        while _goes_on(store, words):
            words = _read(store) or words


def _read(store: Any) -> Words | None:
    return Words(*json.loads(store.get(_WORDS))) if store.check([_WORDS]) else None


def _goes_on(store: Any, words: Words) -> bool:
    """Whether who left them still counts."""
    deadline = time.monotonic() + SILENCE_S
    while not words.is_over and time.monotonic() < deadline:
        now = _read(store)
        if now is not None and now.name != words.name:
            return False
        if now is not None and now != words:
            return not now.is_over
        time.sleep(_SECONDS_BETWEEN_COUNTS)
    return False


class Listener:
    """Of a rank that waits for the others."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.seen: Words | None = None
        self.looked_at = -_SECONDS_BETWEEN_LOOKS

    def listen(self) -> None:
        """Look once in a while. Raises Told if a rank tells that it failed, when all have heard it."""
        if time.monotonic() - self.looked_at < _SECONDS_BETWEEN_LOOKS:
            return
        self.looked_at = time.monotonic()
        before, self.seen = self.seen, _read(self.store)
        if self.seen is None or before is None or self.seen.is_over or self.seen.name != before.name:
            return
        if self.seen.beats > before.beats:
            stay(self.store, self.seen)
            raise Told(self.seen.text)
