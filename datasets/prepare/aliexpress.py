"""AliExpress search (Li et al., CIKM 2020): clicks and purchases in up to five countries -> train, valid and test.

The layout is that of MTReclib (easezyc/Multitask-Recommendation-Library, data/preprocess.py), the usual form of this log: a folder
AliExpress_NL, _ES, _FR, _US or _RU with train.csv and test.csv, which hold search_id, categorical_1 to 16, numerical_1 to 63, click and
conversion. Columns 1 to 9 and 1 to 23 describe user and query, the others the product.

The publishers split train and test along time. `valid.parquet` is the last twentieth of each train.csv, in the file's order, which keeps
searches together. A column `country` is added, and search_id becomes `NL-3`, because ids repeat between countries. Memory holds a block
of text.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..schema import InputError
from .text import Layout, Meter, Outputs, Progress, check_flags, locate, parse_csv, read_header, read_parts

NUM_CATEGORICAL, NUM_NUMERICAL = 16, 63
VALID_SHARE = 0.05
LABELS = ("click", "conversion")
TYPES = (
    {"search_id": pa.int64()}
    | {f"categorical_{i}": pa.int32() for i in range(1, NUM_CATEGORICAL + 1)}
    | {f"numerical_{i}": pa.float32() for i in range(1, NUM_NUMERICAL + 1)}
    | dict.fromkeys(LABELS, pa.int8())
)
LAYOUT = "MTReclib's: folders AliExpress_NL, AliExpress_ES, ..., each with train.csv and test.csv; or one of those folders"


def prepare(source: Path, out: Path, progress: Progress) -> dict[str, int]:
    """Rows of each file written.

    Raises:
        InputError: names the file, and the line where one is broken.
    """
    countries = {_country(folder): locate([folder], ["train.csv", "test.csv"], LAYOUT) for folder in _folders(source)}
    layouts = {path: Layout(read_header(path, list(TYPES)), TYPES, quoted=False) for paths in countries.values() for path in paths}
    meter = Meter(list(layouts), progress)
    with Outputs(out, ["train.parquet", "valid.parquet", "test.parquet"]) as outputs:
        for country, (train, test) in countries.items():
            for part in read_parts(train, partial(_parse, layout=layouts[train]), meter, header=True, tail=VALID_SHARE):
                outputs.write("valid.parquet" if part.in_tail else "train.parquet", _with_country(part.table, country))
            for part in read_parts(test, partial(_parse, layout=layouts[test]), meter, header=True):
                outputs.write("test.parquet", _with_country(part.table, country))
    return outputs.counts


def _folders(source: Path) -> list[Path]:
    if not source.is_dir():
        raise InputError(f"no such folder: {source}; give the one with {LAYOUT}")
    inside = sorted(folder for folder in source.glob("AliExpress_*") if folder.is_dir())
    return inside or [source]


def _country(folder: Path) -> str:
    return folder.resolve().name.removeprefix("AliExpress_")


def _parse(lines: bytes, layout: Layout) -> pa.Table:
    table = parse_csv(lines, layout)
    check_flags(table, LABELS)
    return table


def _with_country(table: pa.Table, country: str) -> pa.Table:
    search_id = pc.binary_join_element_wise(pa.scalar(country), table["search_id"].cast(pa.string()), "-")
    table = table.set_column(table.column_names.index("search_id"), "search_id", search_id)
    return table.append_column("country", pa.repeat(country, len(table)))
