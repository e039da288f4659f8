"""Who hangs, why ranks ended, and how they meet, without processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from triptych.launch.console import FAILURE_FILE
from triptych.launch.faults import meeting
from triptych.launch.faults.places import place_of, places_of_threads
from triptych.launch.faults.reasons import Kind, RankFailure, end_if_final, leave_reason, reason_of
from triptych.launch.faults.stages import stage
from triptych.launch.faults.watchdog import Report, culprits
from triptych.launch.follow import Followed
from triptych.launch.nodes.attempts import Attempts, is_for_the_user


def report(collectives: int, in_collective: bool) -> Report:
    return Report(1, 60.0, "training", "", in_collective, collectives, "0", "host", 1, 1, "1")


WORLDS = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=5)


class TestCulprits:
    @given(WORLDS, st.data())
    def test_who_gives_no_sign_of_life_comes_first(self, world: list[tuple[int, bool]], data: st.DataObject) -> None:
        reports = {rank: report(*facts) for rank, facts in enumerate(world)}
        silent = data.draw(st.sets(st.sampled_from(sorted(reports)), min_size=1))
        assert culprits(reports, silent) == sorted(silent)

    @given(WORLDS)
    def test_others_wait_for_who_entered_the_fewest_collectives(self, world: list[tuple[int, bool]]) -> None:
        found = culprits({rank: report(*facts) for rank, facts in enumerate(world)}, set())
        fewest = min(collectives for collectives, _ in world)
        behind = [rank for rank, (collectives, _) in enumerate(world) if collectives == fewest]
        busy = [rank for rank in behind if not world[rank][1]]
        assert found == (busy if busy else behind)

    def test_where_all_wait_in_the_same_collective_all_are_named(self) -> None:
        assert culprits({0: report(7, True), 1: report(7, True)}, set()) == [0, 1]


class TestReasons:
    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure.json"))
        return tmp_path / "failure.json"

    def fail(self, monkeypatch: pytest.MonkeyPatch, attempt: int, kind: str, message: str, rank: int = 0) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        monkeypatch.setenv("RANK", str(rank))
        leave_reason(kind, message)  # type: ignore[arg-type]

    def test_of_an_attempt_the_first_counts(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stage("starting")
        self.fail(monkeypatch, 0, "failure", "disk\n is gone", rank=1)
        self.fail(monkeypatch, 0, "failure", "peer is gone", rank=0)
        found = reason_of(file, 0)
        assert found is not None and str(found) == "rank 1 failed in 'starting': disk is gone" and not found.is_final
        assert reason_of(file, 1) is None

    def test_an_error_that_comes_back_and_wrong_input_are_final(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for attempt, (kind, message, is_final) in enumerate(
            [("failure", "a", False), ("failure", "b", False), ("failure", "b", True), ("input", "c", True), ("hang", "d", False)]
        ):
            self.fail(monkeypatch, attempt, kind, message)
            found = reason_of(file, attempt)
            assert found is not None and found.is_final == is_final, (attempt, found)

    def test_a_rank_of_a_new_attempt_goes_on_unless_the_last_reason_is_final(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        codes: list[int] = []
        monkeypatch.setattr("os._exit", codes.append)
        end_if_final()
        self.fail(monkeypatch, 0, "failure", "a")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        end_if_final()
        assert codes == []
        for attempt, (kind, code) in enumerate([("input", 2), ("stopped", 143)], 1):
            self.fail(monkeypatch, attempt, kind, "b")
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt + 1))
            end_if_final()
            assert codes.pop() == code
            found = reason_of(file, attempt + 1)
            assert found is not None and found.kind == kind, "the next attempt must find it too"
            (file.parent / f"failure.json.{attempt + 1}").unlink()

    def test_a_node_that_only_joined_again_takes_what_its_ranks_left(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        codes: list[int] = []
        monkeypatch.setattr("os._exit", codes.append)
        left = file.parent / "failure.json.0"
        for kind in ("failure", "input"):
            self.fail(monkeypatch, 0, kind, "a")
            end_if_final()
            assert left.exists() and codes == [], "it is of this very attempt"
            os.utime(left, (0, 0))  # before this process started
            end_if_final()
            assert (left.exists(), codes) == ((False, []) if kind == "failure" else (True, [2]))

    def test_a_killed_rank_counts_for_more_than_who_lost_it(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = ["  rank      : 3 (local_rank: 1)", "  exitcode  : -9 (pid: 14)  (SIGKILL)"]
        self.fail(monkeypatch, 0, "lost", "rank 3 went without a word")
        for lines, host, expected in (
            ([], None, "rank 3 went without a word"),
            (report, "n2", "rank 3 on n2 was killed by signal 9 (out of memory?)"),
        ):
            attempts = Attempts(str(file), 0, host)
            assert [attempts.take(line) for line in lines] == [None] * len(lines)
            assert str(attempts.end) == expected

    def test_without_a_launcher_the_reason_goes_to_stderr(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv(FAILURE_FILE, raising=False)
        leave_reason("input", "no such file")
        assert capsys.readouterr().err == "triptych: no such file\n"


class TestRestartLines:
    FAILED = "E1123 01:15:39 1470 torch/distributed/elastic/api.py:1002] failed (exitcode: {}) local_rank: {} (pid: 7) of binary: python"

    def told(self, tmp_path: Path, lines: list[str], restarts: int, host: str | None = None) -> list[str]:
        attempts = Attempts(str(tmp_path / "failure.json"), restarts, host)
        return [told for told in map(attempts.take, lines) if told is not None]

    def test_each_failed_attempt_but_the_last(self, tmp_path: Path) -> None:
        lines = [
            self.FAILED.format(-9, 1),
            "[0]:resumed",
            "[0]:" + self.FAILED.format(1, 0),
            self.FAILED.format(1, 0),
            self.FAILED.format(-9, 0),
        ]
        assert self.told(tmp_path, lines, 2) == [
            "rank 1 was killed by signal 9; restarting all ranks from the last checkpoint (restart 1 of 2)",
            "a rank was lost; restarting all ranks from the last checkpoint (restart 2 of 2)",
        ]

    def test_of_several_nodes_the_node_is_named(self, tmp_path: Path) -> None:
        assert self.told(tmp_path, [self.FAILED.format(-9, 1)], 1, "n2") == [
            "a rank on n2 was killed by signal 9; restarting all ranks from the last checkpoint (restart 1 of 1)"
        ]

    def test_none_if_a_restart_would_end_the_same_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure.json"))
        leave_reason("input", "no such column")
        assert self.told(tmp_path, [self.FAILED.format(2, 0)], 3) == []


class TestLeft:
    """What the launcher goes by when it waits for torchrun, and no rank is there."""

    @pytest.fixture
    def leave(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Kind], None]:
        monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure.json"))

        def leave(number: int, kind: Kind) -> None:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
            leave_reason(kind, f"{kind} {number}")

        return leave

    def attempts(self, tmp_path: Path, failed: int, restarts: int) -> Attempts:
        return Attempts(str(tmp_path / "failure.json"), restarts, "n1", failed=failed)

    def test_nothing_while_the_first_runs(self, tmp_path: Path) -> None:
        assert self.attempts(tmp_path, 0, 1).left == (None, False)

    @pytest.mark.parametrize(
        ("kind", "restarts", "is_over"), [("lost", 0, True), ("lost", 1, False), ("stopped", 1, True), ("input", 3, True)]
    )
    @pytest.mark.parametrize("failed", [0, 1])
    def test_no_attempt_follows_a_final_reason_or_the_last_attempt(
        self, tmp_path: Path, leave: Callable[[int, Kind], None], kind: Kind, restarts: int, is_over: bool, failed: int
    ) -> None:
        """Before torchrun has logged its failure, and after."""
        leave(0, kind)
        reason, found = self.attempts(tmp_path, failed, restarts).left
        assert reason is not None and (reason.message, found) == (f"{kind} 0", is_over)

    def test_the_present_attempt_comes_first(self, tmp_path: Path, leave: Callable[[int, Kind], None]) -> None:
        leave(0, "lost")
        leave(1, "hang")
        for failed in (1, 2):
            reason, is_over = self.attempts(tmp_path, failed, 1).left
            assert reason is not None and (reason.message, is_over) == ("hang 1", True)


class TestLines:
    @pytest.mark.parametrize(
        "line", ["[3]:train 2/24 epoch 1/1", "[12]:  File 'losses.py', line 3", "[0]:UserWarning: frame", "[1]:[0] is an index"]
    )
    def test_of_ranks_are_shown(self, line: str) -> None:
        assert is_for_the_user(line)

    @pytest.mark.parametrize(
        "line",
        [
            "E1123 01:15:39 1470 torch/distributed/elastic/api.py:1002] failed",
            "Traceback (most recent call last):",
            "  rank      : 0 (local_rank: 0)",
            "[0]:",
            "[1]:[rank1]:[W1122 10:20:30.123456789 TCPStore.cpp:125] [c10d] recvValue failed on SocketImpl(fd=47)",
            "[1]:[W1123 04:09:01.029982354 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3",
            "[1]:Exception raised from recvBytes at /pytorch/torch/csrc/distributed/c10d/Utils.hpp:682 (most recent call first):",
            "[1]:frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x88 (0x7f0 in /lib/libc10.so)",
        ],
    )
    def test_of_the_stack_below_are_not(self, line: str) -> None:
        assert not is_for_the_user(line)


class TestMeeting:
    def attempt(self, store: dist.Store, ranks: list[int], world_size: int, timeout_s: float = 20.0) -> list[dist.Store | str]:
        deadline = time.monotonic() + timeout_s

        def come(rank: int) -> dist.Store | str:
            try:
                if rank == 0:
                    return meeting._call(store, world_size, deadline, timeout_s)
                return meeting._answer(store, rank, deadline, timeout_s)
            except RankFailure as error:
                return str(error)

        with ThreadPoolExecutor(len(ranks)) as threads:
            return list(threads.map(come, ranks))

    def test_what_earlier_attempts_left_in_the_store_does_no_harm(self) -> None:
        store = dist.HashStore()
        for number in range(4):
            met = self.attempt(store, [2, 1, 0] if number % 2 else [0, 1, 2], 3)
            for rank, own in enumerate(met):
                assert isinstance(own, dist.Store) and not own.check([f"came/{rank}"]), (number, met)
                own.set(f"came/{rank}", str(number))
            assert all(isinstance(own, dist.Store) and own.check([f"came/{rank}" for rank in range(3)]) for own in met)
            if number == 1:
                assert self.attempt(store, [0, 2], 3, timeout_s=0.3) == [
                    "of 3 ranks, 1 did not come within 0.3 s; their logs tell why",
                    "some other ranks did not come within 0.3 s; their logs tell why",
                ]
            if number == 2:
                assert "did not come within" in str(self.attempt(store, [1], 3, timeout_s=0.3)[0])


def test_places_are_the_packages_own() -> None:
    try:
        meeting._answer(dist.HashStore(), 1, 0.0, 1.0)
    except RankFailure as error:
        assert place_of(error.__traceback__) is None, "the watching itself is no place"
    try:
        Followed().follow([1])  # type: ignore[list-item]
    except TypeError as error:
        assert (place_of(error.__traceback__) or "").startswith("launch/follow.py:")


def test_threads_beside_the_main_one_are_shown() -> None:
    began, go_on = threading.Event(), threading.Event()

    def lines():
        began.set()
        go_on.wait()
        yield from ()

    thread = threading.Thread(target=Followed().follow, args=(lines(),), name="follower")
    thread.start()
    try:
        began.wait()
        assert "follower: launch/follow.py:" in places_of_threads()
    finally:
        go_on.set()
        thread.join()
