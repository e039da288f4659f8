"""Each user or item once, with the columns of its side: the rows whose vectors are exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .parquet.decode import plain_column
from .parquet.files import list_slices, open_file, read_slices
from .schema import InputError, Schema

ROW_GROUP_ROWS = 20_000


def _newest_of_each(table: pa.Table, id_column: str, time: str | None) -> pa.Table:
    """The last row of each id: by time, where rows have one, and by position among equals."""
    newest_first = table.take(pa.array(np.arange(len(table))[::-1]))
    if time is not None:
        newest_first = newest_first.sort_by([(time, "descending")])  # stable in Arrow; rows without a time go last
    numbered = newest_first.select([id_column]).append_column("_row", pa.array(np.arange(len(table))))
    first = numbered.group_by(id_column, use_threads=False).aggregate([("_row", "min")])
    return newest_first.take(first.column("_row_min"))


def _joined(held: pa.Table | None, table: pa.Table, where: str) -> pa.Table:
    """Both tables' rows; a column's types may differ as between int32 and int64, or strings and large strings."""
    try:
        return table if held is None else pa.concat_tables([held, table], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{where}: columns do not fit those of the rows before ({error})") from error


def write_entities(schema: Schema, paths: list[str], id_feature: str, out: Path) -> int:
    """Write the newest row of each entity, with every column of the id feature's side, to one parquet file.

    Reads slice by slice; memory is bounded by the number of entities.

    Returns:
        The number of entities.
    Raises:
        InputError: null ids, or a column that is not there.
    """
    side, id_column = schema.feature(id_feature).side, schema.feature(id_feature).column
    others = [feature.name for feature in schema.features if feature.side != side]
    listing = list_slices(schema, paths, labels=False, skip_features=others)
    first = open_file(listing.slices[0].file.path)
    time = schema.data.time if schema.data.time in first.schema_arrow.names else None
    columns = list(dict.fromkeys([f.column for f in schema.features if f.side == side] + ([time] if time else [])))
    held: pa.Table | None = None
    for part, table in read_slices(schema, listing.slices, columns):
        where = str(part)
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise InputError(f"{where}: no column '{missing[0]}', which side '{side}' needs")
        if table.column(id_column).null_count:
            raise InputError(f"{where}: column '{id_column}' has {table.column(id_column).null_count} nulls; an entity needs an id")
        plain = pa.table({column: plain_column(table, column) for column in columns})
        held = _newest_of_each(_joined(held, plain, where), id_column, time)
    if held is None:
        raise InputError(f"{', '.join(paths)}: no row could be read")
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(held.sort_by(id_column), out, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return len(held)
