"""Batches of one rank, read ahead by threads; every rank takes the same number of steps."""

from __future__ import annotations

import logging
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from .batch import Batch
from .columns import Columns, Part, empty_columns, to_batch
from .parquet.decode import Decoder
from .parquet.files import SliceReader
from .row_groups import EpochOrder, LaneRange, ReadingPosition, Slice, cuts, fingerprint
from .schema import InputError
from .storage.access import StorageError

T = TypeVar("T")
logger = logging.getLogger(__name__)

_BLOCK_ROWS = 1 << 15
_SHOWN_REASONS = 10


@dataclass
class Tally:
    """What reading left out or changed. By slice, so that what several ranks or epochs read counts once; plain values, for a manifest."""

    bad_files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Path to rows (0 where nobody knows) and reason, of files that were left out as a whole."""
    skipped: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    """A slice's first row in the split, which is the same wherever the files are, to path, rows and reason."""
    capped: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Slice to task to durations below 0, and above the cap."""

    def copy(self) -> Tally:
        """As it is now: threads that read ahead add to it."""
        return Tally(dict(self.bad_files), dict(self.skipped), dict(self.capped))

    def update(self, other: Tally) -> None:
        self.bad_files |= other.bad_files
        self.skipped |= other.skipped
        self.capped |= other.capped

    @property
    def skipped_rows(self) -> int:
        return sum(rows for _, rows, _ in self.skipped.values())

    def report(self) -> dict[str, Any]:
        """As `data` in result.json. Files whose rows cannot be known are counted as files alone."""
        capped: dict[str, dict[str, int]] = {}
        for tasks in self.capped.values():
            for task, (negative, above) in tasks.items():
                counts = capped.setdefault(task, {"negative": 0, "above_cap": 0})
                counts["negative"] += negative
                counts["above_cap"] += above
        files = {path for path, _, _ in self.skipped.values()} | self.bad_files.keys()
        reasons = [*(reason for _, reason in self.bad_files.values()), *(reason for _, _, reason in self.skipped.values())]
        rows = self.skipped_rows + sum(rows for rows, _ in self.bad_files.values())
        skipped = {"rows": rows, "files": len(files), "reasons": reasons[:_SHOWN_REASONS]}
        return {"skipped": skipped, "capped": dict(sorted(capped.items()))}


@dataclass
class Decoded:
    """A slice, and the order of its rows; blocks of them are put in order when they are needed, which spares memory and caches."""

    columns: Columns
    permutation: np.ndarray | None
    block: tuple[int, Columns] | None = None

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        if self.permutation is None:
            yield Part(self.columns, start, stop)
            return
        while start < stop:
            number = start // _BLOCK_ROWS
            first = number * _BLOCK_ROWS
            if self.block is None or self.block[0] != number:
                self.block = (number, self.columns.take(self.permutation[first : first + _BLOCK_ROWS]))
            end = min(stop, first + _BLOCK_ROWS)
            yield Part(self.block[1], start - first, end - first)
            start = end


class LaneReader:
    """Rows of one lane. Holds one decoded slice and, with an executor, has the next one decoded."""

    def __init__(self, order: EpochOrder, lane: int, decoder: Decoder, tally: Tally, executor: Executor | None) -> None:
        self.order, self.slices, self.decoder, self.tally, self.executor = order, order.lanes[lane], decoder, tally, executor
        self.ends = np.cumsum([part.rows for part in self.slices]).tolist()
        self.reader = SliceReader(decoder.columns)
        self.held: tuple[int, Decoded] | None = None
        self.ahead: tuple[int, Future[Decoded]] | None = None

    def read(self, start: int, stop: int) -> Iterator[Part]:
        while start < stop:
            number = bisect_right(self.ends, start)
            first = self.ends[number] - self.slices[number].rows
            end = min(stop, self.ends[number])
            yield from self._slice(number).parts(start - first, end - first)
            start = end

    def start(self, row: int) -> None:
        """Have the slice that holds `row` decoded."""
        self._decode_ahead(bisect_right(self.ends, row))

    def _slice(self, number: int) -> Decoded:
        if self.held is None or self.held[0] != number:
            ahead, self.ahead, self.held = self.ahead, None, None
            if ahead is not None and ahead[0] != number and not ahead[1].cancel():
                ahead[1].exception()  # waits: another rank has those rows, but the reader is for one thread at a time
            decoded = ahead[1].result() if ahead is not None and ahead[0] == number else self._decode(self.slices[number])
            self.held = (number, decoded)
            self._decode_ahead(number + 1)
        return self.held[1]

    def _decode_ahead(self, number: int) -> None:
        if self.executor is not None and number < len(self.slices) and self.ahead is None:
            self.ahead = (number, self.executor.submit(self._decode, self.slices[number]))

    def _decode(self, part: Slice) -> Decoded:
        schema = self.decoder.schema
        try:
            rows, capped = self.decoder.decode(self.reader.read(part), str(part), part.first_row)
        except InputError as error:
            if isinstance(error, StorageError):
                raise
            if schema.data.on_bad_file == "fail":
                raise InputError(f'{error}; mend it, or leave such rows out with data.on_bad_file = "skip"') from error
            key = str(part.first_row)
            if key not in self.tally.skipped:
                logger.warning("skipped %d rows: %s", part.rows, error)
            self.tally.skipped[key] = (part.file.path, part.rows, str(error))
            return Decoded(empty_columns(part.rows, schema), None)
        if capped:
            self.tally.capped[str(part.first_row)] = capped
        return Decoded(rows, self.order.rows_within(part))


class Loader:
    """Reads one rank's batches of a split.

    Args:
        window: row groups open at the same time over all ranks, see EpochOrder.

    A global batch is `batch_size * world_size` rows; the last of an epoch may be smaller and is padded so that all ranks
    have batches of one size. Padded rows weigh nothing.
    """

    def __init__(
        self, decoder: Decoder, slices: Sequence[Slice], *, rank: int, world_size: int, seed: int = 0, shuffle: bool = False,
        window: int = 1, batch_size: int | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.schema, self.slices = decoder, decoder.schema, slices
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.global_batch_size = (batch_size or self.schema.data.batch_size) * world_size
        self.num_rows = sum(part.rows for part in slices)
        self.tally = Tally()

    def steps_left(self, position: ReadingPosition) -> int:
        """Steps from `position` to the end of its epoch."""
        return -(-(self.num_rows - position.row) // self.global_batch_size)

    def after_step(self, position: ReadingPosition) -> ReadingPosition:
        """Where reading stands once the batch at `position` is trained."""
        row = position.row + self.global_batch_size
        return ReadingPosition(position.epoch, row) if row < self.num_rows else ReadingPosition(position.epoch + 1, 0)

    def state_dict(self, position: ReadingPosition) -> dict[str, Any]:
        """A position, and what the order of rows depends on. The same on all ranks, and good for any number of them."""
        order = {
            "train.seed": self.seed,
            "data.shuffle": self.shuffle,
            "data.shuffle_row_groups": self.window,
            "data.memory_mb": self.schema.data.memory_mb,
        }
        files, cut = fingerprint(self.slices), cuts(self.slices)
        return {"epoch": position.epoch, "row": position.row, "files": files, "order": order, "cuts": cut}

    def load_state_dict(self, state: Mapping[str, Any]) -> ReadingPosition:
        """Where another loader stood.

        Raises:
            InputError: the files or, within an epoch, the order of their rows differ.
        """
        now = self.state_dict(ReadingPosition())
        if state["files"] != now["files"]:
            raise InputError("the training files changed since this checkpoint; restore them or start another run")
        for key, value in now["order"].items():
            then = state["order"][key]
            if state["row"] and then != value:
                raise InputError(
                    f"'{key}' differs from the recipe of this checkpoint ({then} then, {value} now); restore it or start another run"
                )
        if state["row"] and state["cuts"] != now["cuts"]:
            raise InputError(
                "the cut of row groups into slices differs from this checkpoint's, as other columns are read; restore the recipe's columns"
                " or start another run"
            )
        return ReadingPosition(state["epoch"], state["row"])

    def batches(self, position: ReadingPosition | None = None, steps: int | None = None) -> Iterator[Batch]:
        """The next `steps` batches from `position` on, or the rest of its epoch."""
        data = self.schema.data

        def read() -> Iterator[Batch]:
            return islice(self._read(position or ReadingPosition()), steps)

        return in_background(read, data.prefetch) if data.workers else read()

    def _read(self, position: ReadingPosition) -> Iterator[Batch]:
        order = EpochOrder(self.slices, seed=self.seed, epoch=position.epoch, shuffle=self.shuffle, window=self.window)
        workers = self.schema.data.workers
        if workers == 0:
            yield from self._batches(order, position.row, None)
            return
        executor = ThreadPoolExecutor(workers, thread_name_prefix="decoder", initializer=_leave_the_cores_to_training)
        try:
            yield from self._batches(order, position.row, executor)
        finally:
            executor.shutdown(cancel_futures=True)

    def _batches(self, order: EpochOrder, row: int, executor: Executor | None) -> Iterator[Batch]:
        lanes: dict[int, LaneReader] = {}
        for start in range(row, self.num_rows, self.global_batch_size):
            stop = min(start + self.global_batch_size, self.num_rows)
            ranges = order.share(start, stop, self.rank, self.world_size)
            # Where lanes do not divide the batch, a boundary lane is this rank's in one batch and not in the next: its reader stays.
            new = [r for r in ranges if r.lane not in lanes]
            lanes |= {r.lane: LaneReader(order, r.lane, self.decoder, self.tally, executor) for r in new}
            for r in new:
                lanes[r.lane].start(r.start)
            yield self._batch(lanes, ranges, -(-(stop - start) // self.world_size))
            finished = np.flatnonzero(order.taken(stop) == order.lane_lengths)
            for lane in finished:
                lanes.pop(int(lane), None)

    def _batch(self, lanes: dict[int, LaneReader], ranges: list[LaneRange], size: int) -> Batch:
        parts = [part for r in ranges for part in lanes[r.lane].read(r.start, r.stop)]
        missing = size - sum(len(part) for part in parts)
        if missing:
            parts.append(Part(empty_columns(missing, self.schema), 0, missing))
        return to_batch(parts, self.schema.id_feature_names)


def _leave_the_cores_to_training() -> None:
    """For the calling thread alone. With threads of their own, torch's operations here would make OpenMP's in training sleep, not spin."""
    torch.set_num_threads(1)


def in_background(make: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """What `make()` yields, computed in a thread at most `depth` items ahead; its exceptions are raised here."""
    ahead: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    # Taken before an item is computed: a bounded queue would let the thread hold one more than its bound.
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        _leave_the_cores_to_training()
        try:
            room.acquire()
            for item in make():
                ahead.put(("item", item))
                room.acquire()
                if stopped.is_set():
                    return
            ahead.put(("end", None))
        except BaseException as error:  # raised again in the reader of the queue
            ahead.put(("error", error))

    thread = threading.Thread(target=work, name="reader", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ahead.get()
            if kind == "end":
                return
            if kind == "error":
                raise item  # type: ignore[misc]
            room.release()
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        room.release()
        thread.join()
