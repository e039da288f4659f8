"""Columns: decoded rows of one row group, ready to be permuted, cut and joined into Batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from .batch import Batch
from .schema import Schema

NO_ID = -1


@dataclass
class Jagged:
    """A list a row: row n holds value_M[offsets_N1[n]:offsets_N1[n + 1]]."""

    value_M: np.ndarray
    offsets_N1: np.ndarray

    @classmethod
    def from_lengths(cls, value_M: np.ndarray, lengths_N: np.ndarray) -> Jagged:
        return cls(value_M, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N, dtype=np.int64)]))

    @classmethod
    def empty(cls, num_rows: int) -> Jagged:
        return cls(np.zeros(0, np.int64), np.zeros(num_rows + 1, np.int64))

    @property
    def lengths_N(self) -> np.ndarray:
        return np.diff(self.offsets_N1)

    def take(self, rows_K: np.ndarray) -> Jagged:
        lengths_K = self.lengths_N[rows_K]
        taken = Jagged.from_lengths(self.value_M, lengths_K)
        shift_K = self.offsets_N1[rows_K] - taken.offsets_N1[:-1]
        taken.value_M = self.value_M[np.arange(taken.offsets_N1[-1]) + np.repeat(shift_K, lengths_K)]
        return taken

    def cut(self, start: int, stop: int) -> Jagged:
        offsets = self.offsets_N1[start : stop + 1]
        return Jagged(self.value_M[offsets[0] : offsets[-1]], offsets - offsets[0])

    def last(self, max_length: int) -> Jagged:
        """Every list without all but its last `max_length` values."""
        lengths_N = self.lengths_N
        from_end_M = np.repeat(self.offsets_N1[1:], lengths_N) - np.arange(len(self.value_M))
        return Jagged.from_lengths(self.value_M[from_end_M <= max_length], np.minimum(lengths_N, max_length))


@dataclass
class Columns:
    """N rows. Shapes: F one-id features, D dense columns, T tasks. An id of NO_ID looks nothing up."""

    ids_FN: np.ndarray
    lists: list[Jagged]
    dense_ND: np.ndarray
    labels_NT: np.ndarray
    known_NT: np.ndarray
    weight_N: np.ndarray
    row_N: np.ndarray

    def __len__(self) -> int:
        return len(self.row_N)

    def take(self, rows_K: np.ndarray) -> Columns:
        return Columns(
            self.ids_FN[:, rows_K], [jagged.take(rows_K) for jagged in self.lists], self.dense_ND[rows_K], self.labels_NT[rows_K],
            self.known_NT[rows_K], self.weight_N[rows_K], self.row_N[rows_K],
        )  # fmt: skip

    def cut(self, start: int, stop: int) -> Columns:
        return Columns(
            self.ids_FN[:, start:stop], [jagged.cut(start, stop) for jagged in self.lists], self.dense_ND[start:stop],
            self.labels_NT[start:stop], self.known_NT[start:stop], self.weight_N[start:stop], self.row_N[start:stop],
        )  # fmt: skip


def empty_columns(num_rows: int, schema: Schema) -> Columns:
    """Rows without ids that weigh nothing. They pad every rank's batch to the same size at the end of an epoch."""
    num_ids, num_tasks = len(schema.one_id_features), len(schema.labels)
    return Columns(
        ids_FN=np.full((num_ids, num_rows), NO_ID),
        lists=[Jagged.empty(num_rows) for _ in schema.list_features],
        dense_ND=np.zeros((num_rows, schema.dense_width), np.float32),
        labels_NT=np.zeros((num_rows, num_tasks), np.float32),
        known_NT=np.zeros((num_rows, num_tasks), bool),
        weight_N=np.zeros(num_rows, np.float32),
        row_N=np.full(num_rows, -1, np.int64),
    )


def to_batch(parts: Sequence[Columns], keys: Sequence[str]) -> Batch:
    """Join parts, which share one layout, into a Batch.

    Args:
        keys: names of the id features: one-id features, then lists, in the order of the parts.
    """
    ids_FB = np.concatenate([part.ids_FN for part in parts], axis=1)
    present_FB = ids_FB != NO_ID
    values, lengths = [ids_FB[present_FB]], [present_FB.reshape(-1).astype(np.int64)]
    for column in zip(*(part.lists for part in parts), strict=True):
        values += [jagged.value_M for jagged in column]
        lengths += [jagged.lengths_N for jagged in column]

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))

    return Batch(
        ids=KeyedJaggedTensor(list(keys), torch.from_numpy(np.concatenate(values)), lengths=torch.from_numpy(np.concatenate(lengths))),
        dense_BD=joined("dense_ND"),
        labels_BT=joined("labels_NT"),
        known_BT=joined("known_NT"),
        weight_B=joined("weight_N"),
        row_B=joined("row_N"),
    )
