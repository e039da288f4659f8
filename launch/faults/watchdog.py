"""A thread beside each rank that ends the run, with the rank and its stage, when nothing gets on any more."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ..nodes import last_words
from ..nodes.bounded_store import BoundedStore
from .places import is_in_collective, places_of_threads
from .reasons import FAILURE, leave_reason, pass_on_reason
from .stages import current_stage, last_progress
from .stop import asked_at

GRACE_AFTER_SIGTERM_S = 60.0
"""Without progress for so long after it was asked to stop, a run will not come to save."""
_MOST_SECONDS_BETWEEN_BEATS = 5.0
_SECONDS_TO_ANSWER = 5.0
_MOST_SECONDS_ASKING = 4 * _SECONDS_TO_ANSWER
"""In a round, of a store that gives no answer: who took longer stood still."""
_BEATS_OF_SILENCE = 3
"""Of a rank that is there, at most."""
_BEATS_TO_HEAR = 4
"""Until ranks on other nodes have seen that this one has said why it ends, at most."""
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BEHIND = 2 * _SECONDS_BETWEEN_LOOKS
"""Until they have also seen that all have said it: ranks of all nodes end at about the same time."""
_LOST_AFTER = 1 / 6
"""Of the timeout, until a host without a sign of life is lost: 300 s of 1800, as schedulers allow a node."""
_LISTED = 8


class Report(NamedTuple):
    """What a rank tells the others of itself."""

    beat: int
    seconds: float
    """Since the last progress."""
    stage: str
    place: str
    is_in_collective: bool
    collectives: int
    """How many this rank has entered: others wait for the one with the fewest."""
    node: str
    """torchrun's number of it: several may be of one name."""
    host: str
    pid: int
    parent: int
    started: str
    """When the process did, in the kernel's words: a pid may be given anew."""
    has_ended: bool = False
    has_said: bool = False
    """Why all must end; it waits for the ranks on other nodes to say so too."""

    def described(self, rank: int, seconds: float, is_silent: bool) -> str:
        silent = "without a sign of life, last " if is_silent else ""
        where = last_words.on(self.host if last_words.host() else None)
        return f"rank {rank}{where} hangs: {seconds:.0f} s {silent}in '{self.stage}'" + (f" ({self.place})" if self.place else "")


class Seen(NamedTuple):
    """A report, and when this rank first saw it, by its own clock."""

    report: Report
    at: float

    def seconds(self, now: float) -> float:
        return self.report.seconds + now - self.at


def culprits(reports: Mapping[int, Report], silent: set[int]) -> list[int]:
    """Whom the others wait for: who gives no sign of life, else who entered the fewest collectives, and of these who is in none now."""
    if silent:
        return sorted(silent)
    fewest = min(report.collectives for report in reports.values())
    behind = [rank for rank, report in reports.items() if report.collectives == fewest]
    busy = [rank for rank in behind if not reports[rank].is_in_collective]
    return sorted(busy or behind)


def _start_and_parent(pid: int) -> tuple[str, int]:
    """Of a process: when it started, and its parent. Raises OSError if there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[19], int(fields[1])


def collectives_entered() -> int:
    """By this rank, in all process groups."""
    with contextlib.suppress(RuntimeError):  # groups come and go in another thread
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    return 0


class Watchdog:
    """Watches this rank and, through a store, the others, while the context is open.

    It ends the run when no rank has entered a stage for `timeout_s` seconds: a rank that waits for one that works is left alone. And, where
    ranks are on several nodes, when no rank of another node gave a sign of life for a sixth of it while this one waits: a host that loses
    power tells nobody, and who only waits for its messages would wait on.

    Args:
        store: of these ranks alone; not used where there is one rank.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, timeout_s: float) -> None:
        self.rank, self.others, self.timeout_s = rank, [other for other in range(world_size) if other != rank], timeout_s
        self.seconds_between_beats = min(_MOST_SECONDS_BETWEEN_BEATS, timeout_s / 10)
        self.store = BoundedStore(dist.PrefixStore("watchdog", store), _SECONDS_TO_ANSWER) if self.others else None
        started, parent = _start_and_parent(os.getpid())
        node = os.environ.get("GROUP_RANK", "0")
        self.identity = {"node": node, "host": socket.gethostname(), "pid": os.getpid(), "parent": parent, "started": started}
        self.beat = 0
        self.floor = self.answered = time.monotonic()
        self.came: set[int] = set()
        """Other ranks that have reported at least once."""
        self.seen: dict[int, Seen] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        awake = time.monotonic()
        self._publish(self._own(awake))
        while not self.over.wait(seconds := min(self.seconds_between_beats, self._limit() / 10)):
            now = time.monotonic()
            if now - awake > 4 * seconds:
                self._begin_anew(now)
            own = self._own(now)
            self._publish(own)
            is_waiting = own.seconds > 2 * seconds
            looked_at = time.monotonic()  # one for all: reading takes a while, and who was read has given a sign of life
            if is_waiting:
                self._read(looked_at)
            awake = time.monotonic()
            if awake - now > _MOST_SECONDS_ASKING:
                self._begin_anew(awake)
            elif is_waiting:
                self._look_for_words(looked_at)
                self._look_for_lost_nodes(looked_at)
                self._look(own, looked_at)
        self._publish(self._own(time.monotonic())._replace(has_ended=True))

    def _begin_anew(self, now: float) -> None:
        """After this process itself, or the machine, stood still: nobody could get on, and no answer came."""
        self.floor, self.answered, self.seen = now, now, {}

    def _own(self, now: float) -> Report:
        self.beat += 1
        seconds = now - max(last_progress(), self.floor, asked_at() or 0.0)
        where = places_of_threads() if seconds > self._limit() / 5 else ""
        return Report(
            self.beat, seconds, current_stage().text, where, is_in_collective(), collectives_entered(), **self.identity  # type: ignore[arg-type]
        )  # fmt: skip

    def _publish(self, own: Report) -> None:
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(str(self.rank), json.dumps(own))
                self.store.check(str(self.rank))  # setting is not answered
                self.answered = time.monotonic()

    def _read(self, now: float) -> None:
        """Take in the other ranks' reports; those that never came are left out."""
        if self.store is None:
            return
        with contextlib.suppress(RuntimeError):
            self.came |= {rank for rank in self.others if rank not in self.came and self.store.check(str(rank))}
            ranks = sorted(self.came)
            for rank, text in zip(ranks, self.store.multi_get([str(rank) for rank in ranks]) if ranks else [], strict=True):
                report = Report(*json.loads(text))
                if rank not in self.seen or self.seen[rank].report.beat != report.beat:
                    self.seen[rank] = Seen(report, now)
            self.answered = time.monotonic()

    def _silence_s(self, limit: float) -> float:
        """After so long without a sign of life nobody is there."""
        return max(limit * _LOST_AFTER, _BEATS_OF_SILENCE * self.seconds_between_beats)

    def _limit(self) -> float:
        return self.timeout_s if asked_at() is None else min(self.timeout_s, GRACE_AFTER_SIGTERM_S)

    def _look_for_lost_nodes(self, now: float) -> None:
        """End the run if another node, or the store on one, gave no sign of life for too long."""
        if last_words.host() is None:
            return
        seconds = self._silence_s(self.timeout_s)
        if now - self.answered >= seconds:
            self._end_lost(f"the store where ranks met, on {os.environ.get('MASTER_ADDR')}, gave no answer", seconds, now)
        elif now > self.answered:
            return  # who is silent is not known just now
        nodes: dict[str, dict[int, Seen]] = {}
        for rank, seen in self.seen.items():
            if not seen.report.has_ended and seen.report.node != self.identity["node"]:
                nodes.setdefault(seen.report.node, {})[rank] = seen
        for ranks in nodes.values():
            if all(now - seen.at >= seconds for seen in ranks.values()):
                hosts = {rank: seen.report.host for rank, seen in ranks.items()}
                self._end_lost(f"{last_words.named(hosts)} gave no sign of life", seconds, now)

    def _end_lost(self, found: str, seconds: float, now: float) -> None:
        self._end(lambda: leave_reason("lost", f"{found} for {seconds:.0f} s: that node is lost, or the network to it"), now)

    def _look(self, own: Report, now: float) -> None:
        """End the run if no rank got on for too long."""
        limit, unanswered = self._limit(), bool(self.others) and now > self.answered
        if unanswered and now - self.answered < self._silence_s(limit):
            return  # others may get on
        watched = {self.rank: Seen(own, now)}
        if not unanswered:
            watched |= {rank: seen for rank, seen in self.seen.items() if not seen.report.has_ended}
        if all(seen.seconds(now) >= limit for seen in watched.values()):
            silent = {rank for rank, seen in watched.items() if now - seen.at >= self._silent_after_s()}
            why = f"if that was work, raise train.timeout_s ({self.timeout_s:g})" if limit == self.timeout_s else "it was asked to stop"
            if unanswered:
                why = f"the store where ranks met, on {os.environ.get('MASTER_ADDR')}, does not answer: that node is gone, or the network"
            self._end(lambda: self._leave_hang(watched, silent, now, why), now)

    def _silent_after_s(self) -> float:
        """Others may not have been asked to stop, and beat slower."""
        return max(self._limit() / 2, _BEATS_OF_SILENCE * self.seconds_between_beats)

    def _leave_hang(self, watched: Mapping[int, Seen], silent: set[int], now: float, why: str) -> None:
        found = culprits({rank: seen.report for rank, seen in watched.items()}, silent)
        described = [watched[rank].report.described(rank, watched[rank].seconds(now), rank in silent) for rank in found[:_LISTED]]
        more = [f"and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
        leave_reason("hang", "; ".join([*described, *more, why]))
        if self.rank in found:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _look_for_words(self, now: float) -> None:
        """End the run if a rank has said that all must end. This one may wait for another, and not see that the one who said it is gone."""
        if any(seen.report.has_said for seen in self.seen.values()):
            self._end(lambda: pass_on_reason(_SECONDS_TO_ANSWER), now)

    def _end(self, say_why: Callable[[], None], now: float) -> None:
        try:
            say_why()
            if now <= self.answered:
                has_others = last_words.host() is not None
                if has_others:
                    self._wait_for_other_nodes()
                self._kill_silent()
                time.sleep(_SECONDS_BEHIND if has_others else 0.0)
        finally:
            os._exit(FAILURE)

    def _wait_for_other_nodes(self) -> None:
        """Until one rank of each has said why too. The place where nodes meet may go with this node: torchrun would end theirs unheard."""
        began = time.monotonic()
        while time.monotonic() - began < _BEATS_TO_HEAR * self.seconds_between_beats:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            now = time.monotonic()
            self._publish(self._own(now)._replace(has_said=True))
            self._read(now)
            alive_after = now - _BEATS_OF_SILENCE * self.seconds_between_beats
            alive = [seen.report for seen in self.seen.values() if seen.at > alive_after and not seen.report.has_ended]
            said = {seen.report.node for seen in self.seen.values() if seen.report.has_said}
            if now > self.answered or {report.node for report in alive} <= {self.identity["node"], *said}:
                return

    def _kill_silent(self) -> None:
        """Of the ranks of the same torchrun: who cannot end itself, nor hear SIGTERM."""
        for seen in self.seen.values():
            if not seen.report.has_ended and self.answered - seen.at >= self._silent_after_s():
                self._kill(seen.report)

    def _kill(self, report: Report) -> None:
        if (report.host, report.parent) != (self.identity["host"], self.identity["parent"]):
            return
        with contextlib.suppress(OSError):
            if _start_and_parent(report.pid) == (report.started, report.parent):
                os.kill(report.pid, signal.SIGKILL)
