"""A store that answers within some seconds or not at all."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from queue import SimpleQueue
from typing import Any

_asking: set[int] = set()
"""Threads that wait for an answer just now."""


def is_asking() -> bool:
    """Whether a store owes an answer. If it came while the interpreter ends, the thread that takes it would abort the process."""
    return bool(_asking)


class BoundedStore:
    """A client of its own of a TCPStore, whose calls raise RuntimeError after `seconds` without an answer, or if they fail.

    The store's timeout is of waiting for keys alone. Where the node that keeps it lost power, `check` and `get` of TCPStore were seen to
    wait for as long as the kernel sends again, a quarter of an hour. After a failure the next call connects anew: a connection can be
    lost where the store is not.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self.store, self.seconds = store, seconds
        self.calls = SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]]]()
        # A daemon: the end of this process does not wait for an answer.
        # Another thread's client would be held by it while it waits.
        threading.Thread(target=self._serve, args=(store.clone(),), name="store", daemon=True).start()

    def _serve(self, client: Any) -> None:
        while True:
            future, name, args = self.calls.get()
            _asking.add(threading.get_ident())
            try:
                client = client or self.store.clone()
                future.set_result(getattr(client, name)(*args))
            except Exception as error:  # else nobody would serve from here on
                client = None
                future.set_exception(error)
            finally:
                _asking.discard(threading.get_ident())

    def _call(self, name: str, *args: Any) -> Any:
        future = Future[Any]()
        self.calls.put((future, name, args))
        try:
            return future.result(self.seconds)
        except TookTooLong as error:
            raise RuntimeError(f"the store where ranks met gave no answer for {self.seconds:g} s") from error

    def set(self, key: str, value: str) -> None:
        self._call("set", key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> None:
        self._call("compare_set", key, expected, desired)

    def check(self, key: str) -> bool:
        return bool(self._call("check", [key]))

    def get(self, key: str) -> str:
        return str(self._call("get", key).decode())

    def multi_get(self, keys: list[str]) -> list[str]:
        """Of keys that are there."""
        return [value.decode() for value in self._call("multi_get", keys)]
