"""Each user or item once, with the columns of its side: the rows whose vectors are exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .fitted import Fitted
from .ids import keyed_codes
from .parquet.decode import Decoder, plain_column
from .parquet.files import open_file, read_slices
from .parquet.listing import list_slices
from .row_groups import Slice
from .schema import Feature, InputError, Schema

Progress = Callable[[int, int], None]
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


def write_entities(
    schema: Schema, fitted: Fitted, paths: list[str], id_feature: str, out: Path, progress: Progress = lambda done, total: None
) -> int:
    """Write the newest row of each entity, with every column of the id feature's side, to one parquet file.

    Reads slice by slice; memory is bounded by the number of entities. Entities are sorted by id, or where their table has a key, by
    the hash of it: a place must not tell an id.

    Returns:
        The number of entities.
    Raises:
        InputError: null ids, a column that is not there, rows that cannot be decoded; with `on_bad_file = "skip"` such slices are left
            out.
    """
    feature = schema.feature(id_feature)
    others = [other.name for other in schema.features if other.side != feature.side]
    listing = list_slices(schema, paths, labels=False, skip_features=others, types=fitted.types.copy())
    first = open_file(listing.slices[0].file.path)
    time = schema.data.time if schema.data.time in first.schema_arrow.names else None
    decoder = Decoder(schema, fitted, labels=False, skip_features=others)
    columns = list(dict.fromkeys(decoder.columns + ([time] if time else [])))
    held: pa.Table | None = None

    def check(part: Slice, table: pa.Table) -> None:
        _check(table, feature, decoder, part, columns)

    for number, (part, table) in enumerate(read_slices(schema, listing.slices, columns, check), 1):
        progress(number, len(listing.slices))
        plain = pa.table({column: plain_column(table, column) for column in columns})
        held = _newest_of_each(_joined(held, plain, str(part)), feature.column, time)
    if held is None:
        raise InputError(f"{', '.join(paths)}: no row could be read")
    key = fitted.keys.get(str(feature.table))
    if key is None:
        held = held.sort_by(feature.column)
    else:
        held = held.take(pa.array(np.argsort(keyed_codes(plain_column(held, feature.column), key))))
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(held, out, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return len(held)


def _check(table: pa.Table, feature: Feature, decoder: Decoder, part: Slice, columns: list[str]) -> None:
    """The rows have ids and can be decoded. Only slices of good rows go on: in the file of entities a bad row would spoil others."""
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise InputError(f"{part}: no column '{missing[0]}', which side '{feature.side}' needs")
    nulls = table.column(feature.column).null_count
    if nulls:
        raise InputError(f"{part}: column '{feature.column}' has {nulls} nulls; an entity needs an id")
    decoder.decode(table, str(part), part.first_row)
