"""Batches of one rank, read in the background; every rank takes the same number of steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from .batch import Batch
from .columns import Columns, empty_columns, to_batch
from .parquet import decode
from .row_groups import EpochOrder, LaneRange, ReadingPosition, RowGroup
from .schema import Schema

T = TypeVar("T")


class LaneReader:
    """Rows of one lane. Holds one decoded row group, so reading onwards decodes each once."""

    def __init__(self, order: EpochOrder, lane: int, decode_group: Callable[[RowGroup], Columns]) -> None:
        self.order, self.groups, self.decode_group = order, order.lanes[lane], decode_group
        self.ends = np.cumsum([group.rows for group in self.groups])
        self.held: tuple[int, Columns] | None = None

    def _group(self, number: int) -> Columns:
        if self.held is None or self.held[0] != number:
            rows = self.decode_group(self.groups[number])
            permutation = self.order.rows_within(self.groups[number])
            self.held = (number, rows if permutation is None else rows.take(permutation))
        return self.held[1]

    def read(self, start: int, stop: int) -> list[Columns]:
        parts = []
        while start < stop:
            number = int(np.searchsorted(self.ends, start, side="right"))
            first = int(self.ends[number]) - self.groups[number].rows
            end = min(stop, int(self.ends[number]))
            parts.append(self._group(number).cut(start - first, end - first))
            start = end
        return parts


class Loader:
    """Reads one rank's batches of a split.

    Args:
        window: row groups open at the same time over all ranks, see EpochOrder.
        labels: whether the files hold labels.
        skip_features: names of features the files lack.

    A global batch is `batch_size * world_size` rows; the last of an epoch may be smaller and is padded so that all ranks
    have batches of one size. Padded rows weigh nothing.
    """

    def __init__(
        self, schema: Schema, row_groups: Sequence[RowGroup], *, rank: int, world_size: int, seed: int = 0, shuffle: bool = False,
        window: int = 1, batch_size: int | None = None, labels: bool = True, skip_features: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.schema, self.row_groups = schema, row_groups
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.global_batch_size = (batch_size or schema.data.batch_size) * world_size
        self.labels, self.skip_features = labels, skip_features
        self.num_rows = sum(group.rows for group in row_groups)

    def steps_left(self, position: ReadingPosition) -> int:
        """Steps from `position` to the end of its epoch."""
        return -(-(self.num_rows - position.row) // self.global_batch_size)

    def after_step(self, position: ReadingPosition) -> ReadingPosition:
        """Where reading stands once the batch at `position` is trained."""
        row = position.row + self.global_batch_size
        return ReadingPosition(position.epoch, row) if row < self.num_rows else ReadingPosition(position.epoch + 1, 0)

    def batches(self, position: ReadingPosition | None = None, steps: int | None = None) -> Iterator[Batch]:
        """The next `steps` batches from `position` on, or the rest of its epoch, read ahead in a thread."""
        return in_background(lambda: islice(self._read(position or ReadingPosition()), steps), self.schema.data.prefetch)

    def _read(self, position: ReadingPosition) -> Iterator[Batch]:
        order = EpochOrder(self.row_groups, seed=self.seed, epoch=position.epoch, shuffle=self.shuffle, window=self.window)
        lanes: dict[int, LaneReader] = {}
        for start in range(position.row, self.num_rows, self.global_batch_size):
            stop = min(start + self.global_batch_size, self.num_rows)
            ranges = order.share(start, stop, self.rank, self.world_size)
            # Where lanes do not divide the batch, a boundary lane is this rank's in one batch and not in the next: its reader stays.
            lanes |= {r.lane: LaneReader(order, r.lane, self._decode) for r in ranges if r.lane not in lanes}
            yield self._batch(lanes, ranges, -(-(stop - start) // self.world_size))
            finished = np.flatnonzero(order.taken(stop) == order.lane_lengths)
            for lane in finished:
                lanes.pop(int(lane), None)

    def _decode(self, group: RowGroup) -> Columns:
        return decode(group, self.schema, labels=self.labels, skip_features=self.skip_features)

    def _batch(self, lanes: dict[int, LaneReader], ranges: list[LaneRange], size: int) -> Batch:
        parts = [part for r in ranges for part in lanes[r.lane].read(r.start, r.stop)]
        missing = size - sum(len(part) for part in parts)
        if missing:
            parts.append(empty_columns(missing, self.schema))
        return to_batch(parts, self.schema.id_feature_names)


def in_background(make: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """What `make()` yields, computed in a thread at most `depth` items ahead; its exceptions are raised here."""
    ahead: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    # Taken before an item is computed: a bounded queue would let the thread hold one more than its bound.
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
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
