"""Raw ids, integers or strings, become rows of a table. Vectorised: no per-row Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from .schema import Feature, InputError, TableIds

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def mix(value_N: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that spreads every input bit (SplitMix64's finaliser; Steele et al., OOPSLA 2014)."""
    x = value_N.astype(np.uint64, copy=True)
    x += _MULTIPLIER
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def string_codes(strings: pa.Array) -> np.ndarray:
    """A 64-bit code of each string: a polynomial over its bytes, modulo 2^64, then mixed with its length."""
    strings = strings.cast(pa.large_binary())
    offsets = np.frombuffer(strings.buffers()[1], np.int64)[strings.offset : strings.offset + len(strings) + 1]
    lengths = np.diff(offsets)
    data = strings.buffers()[2]
    bytes_M = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data is not None else np.zeros(0, np.uint8)
    place_M = np.arange(len(bytes_M)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _MULTIPLIER, np.uint64))
    # Sums modulo 2^64 wrap, so differences of the running sum are exact.
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum((bytes_M.astype(np.uint64) + np.uint64(1)) * powers[place_M])])
    sums = running[offsets[1:] - offsets[0]] - running[offsets[:-1] - offsets[0]]
    return mix(sums ^ lengths.astype(np.uint64))


def _integers(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    try:
        # Floats that hold whole numbers are what pandas writes for integers with nulls.
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        reason = "uint64 ids above 2^63 are not supported" if pa.types.is_unsigned_integer(values.type) else "ids must be whole numbers"
        raise InputError(f"{where}: column '{feature.column}' (feature '{feature.name}'): {reason}") from error


def table_rows(values: pa.Array, feature: Feature, table: TableIds, where: str) -> np.ndarray:
    """Rows of `table` for raw ids without nulls.

    Args:
        values: [N] integers, whole floats, booleans or strings.
        where: file and row group, for messages.
    Returns:
        int64 [N], each in [0, table.rows).
    Raises:
        InputError: an index id that is no row of the table, or an id that is no whole number.
    """
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if table.ids == "hash":
        codes = string_codes(values) if is_text else mix(_integers(values, feature, where).view(np.uint64))
        return (codes % np.uint64(table.rows)).astype(np.int64)
    rows = _integers(values, feature, where)
    bad = np.flatnonzero((rows < 0) | (rows >= table.rows))
    if len(bad):
        raise InputError(
            f"{where}: column '{feature.column}' (feature '{feature.name}'): id {rows[bad[0]]} is outside table '{table.name}' of "
            f'{table.rows} rows ({len(bad)} such values); raise its rows or use ids = "hash"'
        )
    return rows


def bucketise(number_N: np.ndarray, feature: Feature) -> pa.Array:
    """Numbers to the count of bucket edges at or below them; int64 [N]."""
    return pa.array(np.searchsorted(np.asarray(feature.buckets), number_N, side="right"))
