"""A store that answers within some seconds or not at all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from typing import Any


class NoAnswer(RuntimeError):
    """None yet: whoever keeps the store may be gone, or the network for a while."""


class BoundedStore:
    """A client of its own of a TCPStore, whose calls raise NoAnswer after `seconds`, and any other RuntimeError where its keeper is gone.

    The store's timeout is of waiting for keys alone. Where the node that keeps it lost power, `check` and `get` of TCPStore were seen to
    wait for as long as the kernel sends again, a quarter of an hour.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self.store, self.seconds = store.clone(), seconds  # another thread's client would be held by it while it waits
        self.caller = ThreadPoolExecutor(1, "store")

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self.caller.submit(function, *args).result(self.seconds)
        except TookTooLong as error:
            raise NoAnswer(f"the store where ranks met gave no answer for {self.seconds:g} s") from error

    def set(self, key: str, value: str) -> None:
        self._call(self.store.set, key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> None:
        self._call(self.store.compare_set, key, expected, desired)

    def check(self, key: str) -> bool:
        return bool(self._call(self.store.check, [key]))

    def get(self, key: str) -> str:
        return str(self._call(self.store.get, key).decode())
