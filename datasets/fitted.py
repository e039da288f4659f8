"""Fitted: what a run learns of its training files before it trains, and applies to all others. Kept in the run folder.

fitted/statistics.json  fitted/vocabulary_TABLE.parquet
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .durable import replace_text, sync, take_place
from .parquet.layout import ColumnTypes
from .schema import Feature, InputError, Schema, TableIds

UNSEEN_ROW = 0
"""Of a vocabulary table: stands for values that training did not see, or saw too seldom."""
_LEAST_KEY_BYTES = 16
_STATISTICS = "statistics.json"


@dataclass
class Moments:
    """Mean and standard deviation of each of D dimensions, over the training rows that are not null."""

    mean_D: np.ndarray
    deviation_D: np.ndarray

    def apply(self, number_ND: np.ndarray) -> np.ndarray:
        # A constant becomes 0.
        return (number_ND - self.mean_D) / np.where(self.deviation_D > 0, self.deviation_D, 1.0)


@dataclass
class Quantiles:
    """For each of D dimensions: distinct values that ascend, and the share of training rows below each, equal ones counted half."""

    values_D: list[np.ndarray]
    shares_D: list[np.ndarray]

    def apply(self, number_ND: np.ndarray) -> np.ndarray:
        """Linear between the known values; 0 below them all, 1 above."""
        columns = [np.interp(number_ND[:, d], self.values_D[d], self.shares_D[d], 0.0, 1.0) for d in range(number_ND.shape[1])]
        return np.stack(columns, axis=1)


@dataclass
class Vocabulary:
    """The V values of a table that have a row of their own, from row 1 on, the most frequent first."""

    code_V: np.ndarray
    """int64: the integer, or a string's 64-bit code."""
    count_V: np.ndarray

    def __post_init__(self) -> None:
        order = np.argsort(self.code_V)
        self._sorted_V, self._row_V = self.code_V[order], order + 1

    def rows_of(self, code_N: np.ndarray) -> np.ndarray:
        """int64 [N]: 1 to V, or UNSEEN_ROW."""
        if len(self._sorted_V) == 0:
            return np.full(len(code_N), UNSEEN_ROW, np.int64)
        place_N = np.minimum(np.searchsorted(self._sorted_V, code_N), len(self._sorted_V) - 1)
        return np.where(self._sorted_V[place_N] == code_N, self._row_V[place_N], UNSEEN_ROW)


def read_key(path: str) -> bytes:
    """The secret of a `key_file`, 32 bytes.

    Raises:
        InputError: it cannot be read, or is too short to be one.
    """
    try:
        secret = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        raise InputError(f"{path}: cannot read the key_file ({error.strerror})") from error
    if len(secret) < _LEAST_KEY_BYTES:
        raise InputError(
            f"{path}: a key of {len(secret)} bytes; it needs {_LEAST_KEY_BYTES}; make one with: head -c 32 /dev/urandom | base64 > {path}"
        )
    return hashlib.blake2b(secret, digest_size=32, person=b"triptych-ids").digest()


def _check_of(key: bytes) -> str:
    """Tells keys apart and tells nothing of them."""
    return hashlib.blake2b(b"check", digest_size=8, key=key).hexdigest()


@dataclass
class Fitted:
    """Statistics by feature, vocabularies and keys by table, and what type every column of the training files has."""

    moments: dict[str, Moments] = field(default_factory=dict)
    quantiles: dict[str, Quantiles] = field(default_factory=dict)
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    types: ColumnTypes = field(default_factory=ColumnTypes)
    keys: dict[str, bytes] = field(default_factory=dict)
    """Never written down; only a check of each is."""

    def transformed(self, number_ND: np.ndarray, feature: Feature) -> np.ndarray:
        """float64 [N, D]: a dense feature after its transform."""
        if feature.transform == "log1p":
            return np.log1p(number_ND)
        if feature.transform == "standard":
            return self.moments[feature.name].apply(number_ND)
        if feature.transform == "quantile":
            return self.quantiles[feature.name].apply(number_ND)
        return number_ND

    def digest(self) -> str:
        """Of everything that changes what a model reads; a checkpoint is only good for one."""
        digest = hashlib.sha256(json.dumps(self._statistics(), sort_keys=True).encode())
        for name, vocabulary in sorted(self.vocabularies.items()):
            digest.update(name.encode() + vocabulary.code_V.tobytes())
        return digest.hexdigest()[:16]

    def _statistics(self) -> dict[str, Any]:
        return {
            "standard": {
                name: {"mean": m.mean_D.tolist(), "deviation": m.deviation_D.tolist()} for name, m in sorted(self.moments.items())
            },
            "quantile": {
                name: {"values": [v.tolist() for v in q.values_D], "shares": [s.tolist() for s in q.shares_D]}
                for name, q in sorted(self.quantiles.items())
            },
            "keys": {name: _check_of(key) for name, key in sorted(self.keys.items())},
        }

    def save(self, folder: Path) -> None:
        """Write `folder`/fitted, the statistics last: where they are, all is."""
        out = folder / "fitted"
        out.mkdir(parents=True, exist_ok=True)
        for name, vocabulary in self.vocabularies.items():
            table = pa.table({"code": vocabulary.code_V, "count": vocabulary.count_V})
            beside = out / f"vocabulary_{name}.parquet.writing"
            pq.write_table(table, beside, compression="zstd", write_page_checksum=True)
            take_place(beside, beside.with_suffix(""))
        types = {column: list(found) for column, found in self.types.families.items()}
        replace_text(out / _STATISTICS, json.dumps(self._statistics() | {"types": types}, indent=1) + "\n")
        sync(folder)

    @classmethod
    def load(cls, folder: Path, schema: Schema) -> Fitted:
        """What a run fitted.

        Raises:
            InputError: it is not there or damaged, or a key is another one.
        """
        path = folder / "fitted" / _STATISTICS
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            fitted = cls(
                {name: Moments(np.array(m["mean"]), np.array(m["deviation"])) for name, m in content["standard"].items()},
                {
                    name: Quantiles([np.array(v) for v in q["values"]], [np.array(s) for s in q["shares"]])
                    for name, q in content["quantile"].items()
                },
                {table.name: _read_vocabulary(path.parent / f"vocabulary_{table.name}.parquet") for table in vocabulary_tables(schema)},
                ColumnTypes({column: (family, file) for column, (family, file) in content["types"].items()}),
                read_keys(schema),
            )
            checks = content["keys"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path.parent}: cannot read what the run fitted to its training files ({error}); restore it, or train another run"
            ) from error
        check_keys(fitted.keys, checks, path)
        return fitted


def _read_vocabulary(path: Path) -> Vocabulary:
    table = pq.read_table(path, page_checksum_verification=True)
    return Vocabulary(table.column("code").to_numpy(), table.column("count").to_numpy())


def vocabulary_tables(schema: Schema) -> list[TableIds]:
    return [table for table in schema.tables if table.ids == "vocabulary"]


def read_keys(schema: Schema) -> dict[str, bytes]:
    """The key of every table that has one."""
    return {table.name: read_key(table.key_file) for table in schema.tables if table.key_file is not None}


def check_keys(keys: Mapping[str, bytes], checks: Mapping[str, str], path: Path) -> None:
    for name, key in keys.items():
        if checks.get(name) != _check_of(key):
            raise InputError(f"{path}: table '{name}' was trained with another key than its key_file holds; restore the file")
