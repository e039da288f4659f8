"""A uniform sample of rows in fixed memory, the same however the rows are cut into chunks.

A row is in the sample if the hash of its number is among the smallest. Texts and lists are held as 64-bit codes: equal
values, equal codes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..ids import mix
from .columns import kind_of, plain
from .sketches import codes_of


def list_codes(lists: pa.Array, element: str) -> pa.Array:
    """One int64 code a list [N], null for null; the order of the elements matters."""
    lengths_N = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(lists)
    codes_M = np.zeros(len(flat), np.uint64)
    if kind_of(flat.type) != "null":
        flat = plain(flat, element)
        known = flat.is_valid().to_numpy(zero_copy_only=False)
        codes_M[known] = codes_of(flat.drop_null())
    ends_N = np.cumsum(lengths_N)
    place_M = np.arange(len(codes_M)) - np.repeat(ends_N - lengths_N, lengths_N)
    # Sums modulo 2^64 wrap, so differences of the running sum are exact.
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix(codes_M + place_M.astype(np.uint64)))])
    codes_N = mix((running[ends_N] - running[ends_N - lengths_N]) ^ lengths_N.astype(np.uint64))
    return pa.array(codes_N.view(np.int64), mask=lists.is_null().to_numpy(zero_copy_only=False))


class RowSample:
    """`size` rows, drawn without replacement; all of them where there are no more.

    Args:
        kinds: {column: (kind, kind of its elements)}, as in `ColumnProfile`; columns of kind "other" are left out.
    """

    def __init__(self, kinds: dict[str, tuple[str, str]], size: int, seed: int = 0) -> None:
        self.kinds = {name: pair for name, pair in kinds.items() if pair[1] not in ("other", "null", "list")}
        self.size, self.seed = size, mix(np.array([seed]))[0]
        self.threshold = np.uint64(2**64 - 1)
        self.tables: list[pa.Table] = []
        self.held = 0

    def add(self, first_row: int, columns: dict[str, pa.Array]) -> None:
        """Take in rows [first_row, first_row + N): their columns, plain, see `ColumnTally.add`."""
        count = len(next(iter(columns.values())))
        hash_N = mix(np.arange(first_row, first_row + count).astype(np.uint64) ^ self.seed)
        chosen = np.flatnonzero(hash_N <= self.threshold)
        if len(chosen) == 0:
            return
        if len(chosen) < count:
            columns = {name: columns[name].take(pa.array(chosen)) for name in self.kinds}
        arrays = {name: self._coded(columns[name], *self.kinds[name]) for name in self.kinds}
        # The hash goes first and is found by its place: any name could be a column's.
        self.tables.append(pa.Table.from_arrays([pa.array(hash_N[chosen]), *arrays.values()], ["hash", *arrays]))
        self.held += len(chosen)
        if self.held > 2 * self.size:
            self._prune()

    @staticmethod
    def _coded(values: pa.Array, kind: str, element: str) -> pa.Array:
        if kind == "list":
            return list_codes(values, element)
        if kind != "text":
            return values
        encoded = values.dictionary_encode()
        return pa.array(codes_of(encoded.dictionary).view(np.int64)).take(encoded.indices)

    def _prune(self) -> None:
        table = pa.concat_tables(self.tables)
        hash_N = table.column(0).to_numpy()
        order = np.argsort(hash_N)[: self.size]
        self.tables, self.held = [table.take(pa.array(order)).combine_chunks()], len(order)
        if self.held == self.size and self.size:
            self.threshold = hash_N[order[-1]]

    def rows(self) -> pa.Table:
        """The sample in random order, int64 and float64 columns."""
        if not self.tables:
            return pa.table({name: pa.array([], pa.int64()) for name in self.kinds})
        self._prune()
        return self.tables[0].remove_column(0)
