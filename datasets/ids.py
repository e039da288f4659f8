"""Raw ids, integers or strings, become rows of a table. Vectorised: no per-row Python."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from .fitted import Fitted
from .parquet.layout import is_text
from .schema import Feature, InputError, TableIds

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 14


def _mix_block(value_N: np.ndarray, mixed_N: np.ndarray, scratch_N: np.ndarray) -> None:
    np.add(value_N.view(np.uint64), _MULTIPLIER, out=mixed_N)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(mixed_N, np.uint64(shift), out=scratch_N)
        np.bitwise_xor(mixed_N, scratch_N, out=mixed_N)
        if factor is not None:
            np.multiply(mixed_N, np.uint64(factor), out=mixed_N)


def mix(value_N: np.ndarray) -> np.ndarray:
    """uint64 [N]: a bijection of 64-bit integers that spreads every bit (SplitMix64's finaliser; Steele et al., OOPSLA 2014)."""
    mixed_N = np.empty(len(value_N), np.uint64)
    scratch_N = np.empty(min(len(value_N), _BLOCK), np.uint64)
    for start in range(0, len(value_N), _BLOCK):  # a block stays in the cache through all its passes
        block_N = mixed_N[start : start + _BLOCK]
        _mix_block(value_N[start : start + _BLOCK], block_N, scratch_N[: len(block_N)])
    return mixed_N


def _row_type(table: TableIds) -> type[np.signedinteger]:
    """Rows are held in four bytes where they fit: what is held until its turn comes is mostly ids."""
    return np.int32 if table.rows <= 2**31 else np.int64


def _mixed_rows(value_N: np.ndarray, table: TableIds) -> np.ndarray:
    """mix(value_N) modulo the table's rows; by a division, which numpy vectorises, as it does not the remainder."""
    row_N, rows = np.empty(len(value_N), _row_type(table)), np.uint64(table.rows)
    mixed, scratch = np.empty((2, min(len(value_N), _BLOCK)), np.uint64)
    for start in range(0, len(value_N), _BLOCK):
        block_N = value_N[start : start + _BLOCK]
        mixed_N, scratch_N = mixed[: len(block_N)], scratch[: len(block_N)]
        _mix_block(block_N, mixed_N, scratch_N)
        np.floor_divide(mixed_N, rows, out=scratch_N)
        np.multiply(scratch_N, rows, out=scratch_N)
        np.subtract(mixed_N, scratch_N, out=row_N[start : start + _BLOCK], casting="unsafe")
    return row_N


def _checked_rows(value_N: np.ndarray, table: TableIds) -> np.ndarray | None:
    """The ids as rows, or None if one is outside the table."""
    row_N = np.empty(len(value_N), _row_type(table))
    for start in range(0, len(value_N), _BLOCK):
        block_N = value_N[start : start + _BLOCK]
        if int(block_N.view(np.uint64).max()) >= table.rows:  # negative ones are huge without their sign
            return None
        row_N[start : start + _BLOCK] = block_N
    return row_N


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


def keyed_codes(values: pa.Array, key: bytes) -> np.ndarray:
    """uint64 [N]: keyed BLAKE2b (RFC 7693) of each id's decimal or UTF-8 text. Without the key nobody can try ids out."""
    if not (is_text(values.type) or pa.types.is_integer(values.type)):
        values = values.cast(pa.int64())  # so that an id has one text, whatever holds it
    encoded = values.dictionary_encode()
    texts = encoded.dictionary.cast(pa.large_string()).cast(pa.large_binary())
    codes = b"".join(hashlib.blake2b(text.as_py(), digest_size=8, key=key).digest() for text in texts)
    return np.frombuffer(codes, "<u8").take(encoded.indices.to_numpy(zero_copy_only=False))


def hashed_ids(values: pa.Array, key: bytes) -> pa.Array:
    """Strings [N]: the keyed codes of whole numbers or strings, in hexadecimal."""
    return pa.array([f"{code:016x}" for code in keyed_codes(values, key).tolist()], pa.string())


def _integers(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    """int64 [N]; uint64 ids keep their bits."""
    if pa.types.is_uint64(values.type):
        return values.to_numpy(zero_copy_only=False).view(np.int64)
    try:
        # Floats that hold whole numbers are what pandas writes for integers with nulls.
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{where}: column '{feature.column}' (feature '{feature.name}'): ids must be whole numbers or strings ({reason})"
        ) from error


def id_codes(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    """int64 [N]: equal for equal ids. Integers stand for themselves, strings for a 64-bit code."""
    return string_codes(values).view(np.int64) if is_text(values.type) else _integers(values, feature, where)


def table_rows(values: pa.Array, feature: Feature, table: TableIds, fitted: Fitted, where: str) -> np.ndarray:
    """Rows of a table for ids without nulls, int32 or int64 [N]; of a dynamic table, whose rows change with time, the ids themselves.

    Args:
        values: integers, strings, or floats that hold whole numbers.
        where: file and row group, for messages.
    Raises:
        InputError: ids that are no whole numbers, or that an `index` table has no row for.
    """
    if len(values) == 0:
        return np.zeros(0, np.int64)
    if table.name in fitted.keys:
        if not is_text(values.type):
            _integers(values, feature, where)  # names the column of what is no whole number
        return (keyed_codes(values, fitted.keys[table.name]) % np.uint64(table.rows)).view(np.int64)
    if table.ids == "dynamic":
        return id_codes(values, feature, where)
    if table.ids == "vocabulary":
        return fitted.vocabularies[table.name].rows_of(id_codes(values, feature, where))
    if table.ids == "hash":
        if is_text(values.type):
            return (string_codes(values) % np.uint64(table.rows)).view(np.int64)
        return _mixed_rows(_integers(values, feature, where), table)
    if is_text(values.type):
        raise InputError(
            f"{where}: column '{feature.column}' (feature '{feature.name}') holds strings, but table '{table.name}' takes row numbers "
            'as ids; use ids = "hash" or "vocabulary"'
        )
    ids = _integers(values, feature, where)
    rows = _checked_rows(ids, table)
    if rows is None:
        bad = np.flatnonzero(ids.view(np.uint64) >= np.uint64(table.rows))
        raise InputError(
            f"{where}: column '{feature.column}' (feature '{feature.name}'): id {values[int(bad[0])].as_py()} is outside table "
            f"'{table.name}' of {table.rows} rows ({len(bad)} such values); raise its rows or use ids = \"hash\""
        )
    return rows


def bucketise(number_N: np.ndarray, feature: Feature) -> pa.Array:
    """Numbers to the count of bucket edges at or below them; int64 [N]."""
    return pa.array(np.searchsorted(np.asarray(feature.buckets), number_N, side="right"))
