"""Vectors of entities as parquet: a column of ids, a column of fixed-size lists; one part a rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ..datasets.schema import InputError

VECTOR = "vector"


def write_part(folder: Path, part: int, id_column: str, ids: pa.Array, vector_ND: np.ndarray) -> None:
    """Write one rank's ids [N] and vectors float32 [N, D]."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vector_ND, np.float32).reshape(-1)), vector_ND.shape[1])
    table = pa.table({id_column: ids, VECTOR: vectors})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"part_{part:05d}.parquet", compression="zstd", write_page_checksum=True)


def read_all(folder: Path, id_column: str) -> tuple[pa.Array, np.ndarray]:
    """Ids [N] and vectors float32 [N, D] of all parts, in order."""
    table = ds.dataset(folder, format="parquet").to_table()
    return table.column(id_column).combine_chunks(), _matrix(table.column(VECTOR))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    chunks = [np.asarray(chunk.flatten()).reshape(len(chunk), chunk.type.list_size) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, column.type.list_size), np.float32)


def find_vector(folder: Path, id_column: str, entity_id: str) -> np.ndarray:
    """The vector float32 [D] of one entity, by its id as text.

    Raises:
        InputError: the id is unknown, or of another type than the ids.
    """
    dataset = ds.dataset(folder, format="parquet")
    kind = dataset.schema.field(id_column).type
    try:
        wanted = pa.scalar(entity_id).cast(kind)
    except pa.ArrowException as error:
        raise InputError(f"{id_column} '{entity_id}' is no {kind}, as the ids in {folder} are") from error
    found = dataset.to_table(filter=pc.field(id_column) == wanted)
    if len(found) == 0:
        raise InputError(f"{id_column} '{entity_id}' is not in {folder}: it has no row in the training data")
    return _matrix(found.column(VECTOR))[0]
