"""Column chunks: which ones store a column, and what the footer says of them, once it is known to be sound."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.parquet as pq


def leaves(metadata: pq.FileMetaData, columns: Collection[str]) -> list[int]:
    """The numbers of all that the file stores for these columns; names may have dots."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    return [n for n, path in enumerate(paths) if any(path == column or path.startswith(f"{column}.") for column in columns)]


def chunks(metadata: pq.FileMetaData, row_group: int, numbers: Collection[int]) -> Iterator[pq.ColumnChunkMetaData]:
    """What the footer says of these leaves in one row group.

    Raises:
        ArrowException, OSError: it is damaged.
    """
    nothing = pq.ParquetFile(pa.BufferReader(b""), metadata=metadata)
    for number in numbers:
        # Asking for sizes that are damaged would end the process (Arrow 26). Reading raises; a sound chunk lies beyond the end of nothing.
        try:
            nothing.reader.read_row_group(row_group, column_indices=[number], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if "Invalid column metadata" not in str(error):
                raise
        yield metadata.row_group(row_group).column(number)
