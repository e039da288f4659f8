"""Columns: decoded rows of one slice, ready to be permuted, cut and joined into Batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .batch import Batch
from .schema import Schema

# Arrow's memory is read-only, and so are our uses of it.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


@dataclass
class Jagged:
    """Values of N rows: row n holds value_M[offsets_N1[n]:offsets_N1[n + 1]]. Without offsets every row holds one value."""

    value_M: np.ndarray
    offsets_N1: np.ndarray | None = None

    @classmethod
    def from_lengths(cls, value_M: np.ndarray, lengths_N: np.ndarray) -> Jagged:
        offsets_N1 = np.zeros(len(lengths_N) + 1, np.int64)
        np.cumsum(lengths_N, out=offsets_N1[1:])
        return cls(value_M, offsets_N1)

    @classmethod
    def empty(cls, num_rows: int) -> Jagged:
        return cls(np.zeros(0, np.int64), np.zeros(num_rows + 1, np.int64))

    def __len__(self) -> int:
        return len(self.value_M) if self.offsets_N1 is None else len(self.offsets_N1) - 1

    @cached_property
    def lengths_N(self) -> np.ndarray:
        return np.ones(len(self), np.int64) if self.offsets_N1 is None else np.diff(self.offsets_N1)

    def take(self, rows_K: np.ndarray) -> Jagged:
        if self.offsets_N1 is None:
            return Jagged(torch.index_select(torch.from_numpy(self.value_M), 0, torch.from_numpy(rows_K)).numpy())
        if len(self.value_M) == 0:
            return Jagged.empty(len(rows_K))
        # One memcpy a row: three times as fast as numpy's gather of single values.
        rows, lengths, values = (torch.from_numpy(a) for a in (rows_K.astype(np.int32), self.lengths_N, self.value_M))
        lengths_K, value_M, _ = torch.ops.fbgemm.permute_1D_sparse_data(rows, lengths, values, None, None)
        return Jagged.from_lengths(value_M.numpy(), lengths_K.numpy())

    def last(self, max_length: int) -> Jagged:
        """Every list without all but its last `max_length` values."""
        lengths_N = self.lengths_N
        if lengths_N.max(initial=0) <= max_length:
            return self
        assert self.offsets_N1 is not None
        from_end_M = np.repeat(self.offsets_N1[1:], lengths_N) - np.arange(len(self.value_M))
        return Jagged.from_lengths(self.value_M[from_end_M <= max_length], np.minimum(lengths_N, max_length))


@dataclass
class Columns:
    """N rows. Shapes: F id features in the order of Schema.id_feature_names, D dense columns, T tasks."""

    ids_F: list[Jagged]
    dense_ND: np.ndarray
    labels_NT: np.ndarray
    known_NT: np.ndarray
    weight_N: np.ndarray
    row_N: np.ndarray

    def __len__(self) -> int:
        return len(self.row_N)

    def take(self, rows_K: np.ndarray) -> Columns:
        rows = torch.from_numpy(rows_K)

        def taken(array_N: np.ndarray) -> np.ndarray:
            return torch.index_select(torch.from_numpy(array_N), 0, rows).numpy()

        return Columns(
            [ids.take(rows_K) for ids in self.ids_F], taken(self.dense_ND), taken(self.labels_NT), taken(self.known_NT),
            taken(self.weight_N), taken(self.row_N),
        )  # fmt: skip


def unlabelled(num_rows: int, schema: Schema) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, whether they are known, and weights, of rows of which nothing is known."""
    shape = num_rows, len(schema.labels)
    return np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(num_rows, np.float32)


def empty_columns(num_rows: int, schema: Schema) -> Columns:
    """Rows without ids that weigh nothing: they pad batches at the end of an epoch, and stand for rows that cannot be read."""
    ids_F = [Jagged.empty(num_rows)] * len(schema.id_feature_names)
    dense_ND = np.zeros((num_rows, schema.dense_width), np.float32)
    return Columns(ids_F, dense_ND, *unlabelled(num_rows, schema), np.full(num_rows, -1, np.int64))


@dataclass
class Part:
    """Rows [start, stop) of some columns."""

    columns: Columns
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def to_batch(parts: Sequence[Part], keys: Sequence[str]) -> Batch:
    """Copy parts, which share one layout, into a Batch.

    Args:
        keys: names of the id features, in the order of the parts' ids.
    """
    values: list[np.ndarray] = []
    lengths_FB = np.ones((len(keys), sum(len(part) for part in parts)), np.int64)
    first = 0
    pieces = []
    for part in parts:
        pieces.append((part.columns.ids_F, part.start, part.stop, first))
        first += len(part)
    for f, length_B in enumerate(lengths_FB):
        for ids_F, start, stop, first in pieces:
            value_M, offsets_N1 = ids_F[f].value_M, ids_F[f].offsets_N1
            if offsets_N1 is None:
                values.append(value_M[start:stop])
            else:
                offsets = offsets_N1[start : stop + 1]
                values.append(value_M[offsets[0] : offsets[-1]])
                np.subtract(offsets[1:], offsets[:-1], out=length_B[first : first + stop - start])

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(part.columns, name)[part.start : part.stop] for part in parts]))

    flat = np.concatenate(values, dtype=np.int64) if values else np.zeros(0, np.int64)
    return Batch(
        ids=KeyedJaggedTensor(list(keys), torch.from_numpy(flat), lengths=torch.from_numpy(lengths_FB.reshape(-1))),
        dense_BD=joined("dense_ND"),
        labels_BT=joined("labels_NT"),
        known_BT=joined("known_NT"),
        weight_B=joined("weight_N"),
        row_B=joined("row_N"),
    )
