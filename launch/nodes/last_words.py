"""Why a rank ended, for the ranks on other nodes: the first one's words, kept in the store where they met."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from .bounded_store import BoundedStore

_SECONDS_TO_ANSWER = 2.0
_SECONDS_BETWEEN_LOOKS = 0.05
_LISTED = 8
_WORDS = "words"
_shared: _Shared | None = None


def host() -> str | None:
    """This host's name, where ranks are on several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return socket.gethostname() if several else None


def on(host: str | None) -> str:
    return f" on {host}" if host else ""


def named(host_of_rank: Mapping[int, str]) -> str:
    """Some ranks, for the user: ranks 0, 1 on n1."""
    ranks, hosts = sorted(host_of_rank), sorted({host for host in host_of_rank.values() if host})
    listed = ", ".join(map(str, ranks[:_LISTED])) + (", ..." if len(ranks) > _LISTED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{on(', '.join(hosts))}"


def share(store: Any, rank: int, world_size: int) -> None:
    """From now on ranks hear each other's last words.

    Args:
        store: of these ranks alone.
    """
    global _shared
    _shared = _Shared(BoundedStore(store, _SECONDS_TO_ANSWER), rank, world_size) if world_size > 1 else None


def tell(words: str) -> None:
    """Those of the first rank that tells any count."""
    if _shared is not None:
        _shared.tell(words)


def heard(seconds: float) -> str | None:
    """The first rank's words; None if none came in time, or the store is gone."""
    return None if _shared is None else _shared.heard(seconds)


def silent() -> str | None:
    """After `heard`: who went without a word, as far as it can be known."""
    return None if _shared is None else _shared.silent()


class _Shared:
    """The store of one attempt."""

    def __init__(self, store: BoundedStore, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        store.set(f"host/{rank}", host() or "")

    def tell(self, words: str) -> None:
        try:
            self.store.compare_set(_WORDS, "", words)
        except RuntimeError:  # whoever kept it is gone
            return

    def heard(self, seconds: float) -> str | None:
        deadline = time.monotonic() + seconds
        try:
            self.store.set(f"alive/{self.rank}", "")
            while not self.store.check(_WORDS):
                if time.monotonic() > deadline:
                    return None
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            return self.store.get(_WORDS)
        except RuntimeError:
            return None

    def silent(self) -> str | None:
        try:
            ranks = [rank for rank in range(self.world_size) if not self.store.check(f"alive/{rank}")]
            hosts = {rank: self.store.get(f"host/{rank}") for rank in ranks}
        except RuntimeError:
            return None
        return named(hosts) if hosts else None
