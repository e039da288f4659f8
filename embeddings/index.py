"""A FAISS index over item vectors, and the item id of each of its positions."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..datasets.schema import InputError

INDEX, IDS = "items.faiss", "item_ids.parquet"


def save_index(folder: Path, ids: pa.Array, vector_ND: np.ndarray) -> None:
    """Build an exact inner-product index and write it with its ids. Position n of the index is ids[n]."""
    index = faiss.IndexFlatIP(vector_ND.shape[1])
    index.add(np.ascontiguousarray(vector_ND, np.float32))
    faiss.write_index(index, str(folder / INDEX))
    pq.write_table(pa.table({"id": ids}), folder / IDS, compression="zstd", write_page_checksum=True)


def search_index(folder: Path, vector_D: np.ndarray, k: int) -> list[tuple[int | str, float]]:
    """The k items of largest inner product with a vector: (item id, score), best first. Fewer if there are fewer items.

    Raises:
        InputError: no index there, or one that does not fit its ids or the vector.
    """
    try:
        index = faiss.read_index(str(folder / INDEX))
        ids = pq.read_table(folder / IDS, page_checksum_verification=True).column("id")
    except (RuntimeError, OSError, pa.ArrowException) as error:
        raise InputError(f"{folder}: no readable index ({INDEX}, {IDS}); make one with: triptych export") from error
    if index.ntotal != len(ids) or index.d != len(vector_D):
        raise InputError(f"{folder}: index of {index.ntotal} items x {index.d} does not fit {len(ids)} ids and a vector of {len(vector_D)}")
    scores, positions = index.search(np.ascontiguousarray(vector_D[None], np.float32), min(k, index.ntotal))
    return [(ids[int(p)].as_py(), float(s)) for s, p in zip(scores[0], positions[0], strict=True) if p >= 0]
