"""Sort more rows by time than memory holds: sorted runs on disk, then one merge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

RUN_ROWS = 250_000
"""Sorted in memory at a time."""
CHUNK_ROWS = 4_096
"""Of each run, in memory during the merge."""
_ROW = "__row"


def sort_by_time(tables: Iterable[pa.Table], time: str, scratch: Path) -> Iterator[pa.Table]:
    """The rows of all tables by ascending `time`; ties keep their order. External merge sort (Knuth, TAOCP vol. 3, 5.4).

    Memory holds RUN_ROWS rows, or CHUNK_ROWS rows of each run, whichever is more; the disk holds all rows, uncompressed.

    Args:
        time: integer column without nulls.
        scratch: an empty folder for the runs.
    """
    runs: list[Path] = []
    waiting: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        numbered = table.append_column(_ROW, pa.array(np.arange(num_rows, num_rows + len(table))))
        num_rows += len(table)
        waiting.append(numbered)
        if sum(map(len, waiting)) >= RUN_ROWS:
            runs.append(_write_run(waiting, time, scratch / f"{len(runs)}.arrow"))
            waiting = []
    if waiting:
        runs.append(_write_run(waiting, time, scratch / f"{len(runs)}.arrow"))
    waiting = []
    yield from _merge(runs, time)


def _write_run(tables: list[pa.Table], time: str, path: Path) -> Path:
    rows = pa.concat_tables(tables).sort_by([(time, "ascending"), (_ROW, "ascending")])
    with pa.ipc.new_file(path, rows.schema) as file:
        file.write_table(rows, CHUNK_ROWS)
    return path


def _chunks(run: Path) -> Iterator[pa.Table]:
    with pa.memory_map(str(run)) as mapped:
        file = pa.ipc.open_file(mapped)
        for i in range(file.num_record_batches):
            yield pa.Table.from_batches([file.get_batch(i)])


def _merge(runs: list[Path], time: str) -> Iterator[pa.Table]:
    streams = [_chunks(run) for run in runs]
    heads: dict[int, pa.Table] = {}
    while True:
        for i, stream in enumerate(streams):
            if i not in heads and (chunk := next(stream, None)) is not None:
                heads[i] = chunk
        if not heads:
            return
        # Of every run, all rows up to here are in memory.
        bound = min((head[time][-1].as_py(), head[_ROW][-1].as_py()) for head in heads.values())
        ready = []
        for i, head in list(heads.items()):
            count = _rows_up_to(head, time, bound)
            ready.append(head.slice(0, count))
            heads[i] = head.slice(count)
            if count == len(head):
                del heads[i]
        yield pa.concat_tables(ready).sort_by([(time, "ascending"), (_ROW, "ascending")]).drop_columns([_ROW])


def _rows_up_to(head: pa.Table, time: str, bound: tuple[int, int]) -> int:
    time_N, row_N = head[time].to_numpy(), head[_ROW].to_numpy()
    return int(np.count_nonzero((time_N < bound[0]) | ((time_N == bound[0]) & (row_N <= bound[1]))))
