"""Ali-CCP (Ma et al., ESMM, SIGIR 2018; Tianchi data set 408): Taobao impressions, clicks and purchases -> train, valid and test.

sample_skeleton_{train,test}.csv, no header: sample id, click, purchase, index of the common features, number of features, features.
common_features_{train,test}.csv, no header: index, number of features, features; shared by the impressions of a user in a while.
Features: `field \\x02 id \\x03 value`, with \\x01 between them. The fields and their meaning are the 23 of the Tianchi page, as listed in
NVIDIA Merlin's reader of this log; they get names here (FIELDS). Ids are numbered across all fields.

Fields with one id become a column, null where the impression lacks the field. The lists keep the HISTORY ids with the largest values, in
ascending order of value, the strongest last. The four combination fields get a column `_strength` more, their value, 0 without.

The publishers split train and test along time: `test.parquet` is the official test. Rows have no time, and stand together by their common
features, so the tail of train is no later time but other users. `valid.parquet` holds out whole groups instead: all rows of one in
twenty common features, chosen by the hash of their index. Rows with a purchase but no click are dropped, as is usual for this log.

Memory holds the common features, at most 4 lists of HISTORY 4-byte ids and 9 ids each: less than 1 kB, 0.7 GB for the official 730,000
(and one column of them twice, while it is put in one piece); and a block of text, parsed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..ids import string_codes
from .text import Layout, Meter, Outputs, Progress, check_flags, locate, parse_csv, read_parts

HISTORY = 50
VALID_ONE_IN = 20
USER_IDS = {
    "101": "user_id", "121": "profile", "122": "profile_group", "124": "gender", "125": "age", "126": "consumption_1",
    "127": "consumption_2", "128": "occupation", "129": "geography",
}  # fmt: skip
USER_LISTS = {"109_14": "category_history", "110_14": "shop_history", "127_14": "brand_history", "150_14": "intention_history"}
ITEM_IDS = {"205": "item_id", "206": "category_id", "207": "shop_id", "216": "brand_id"}
ITEM_LISTS = {"210": "intention_ids"}
COMBINATIONS = {"508": "category_match", "509": "shop_match", "702": "brand_match", "853": "intention_match"}
CONTEXT_IDS = {"301": "position"}
FIELDS = USER_IDS | USER_LISTS | ITEM_IDS | ITEM_LISTS | COMBINATIONS | CONTEXT_IDS
_CODES = {field: code for code, field in enumerate(FIELDS)}

SKELETON = {
    "sample_id": pa.int64(), "click": pa.int8(), "conversion": pa.int8(), "common_feature_index": pa.string(),
    "feature_num": pa.int64(), "feature_list": pa.string(),
}  # fmt: skip
COMMON = {name: SKELETON[name] for name in ("common_feature_index", "feature_num", "feature_list")}
TOKENS = {"field": pa.string(), "id": pa.int32(), "value": pa.float32()}
_SEPARATORS = bytes.maketrans(b"\x01\x02\x03", b"\n,,")
LAYOUT = (
    "Tianchi's: sample_skeleton_train.csv and common_features_train.csv, in the folder or its subfolders sample_train or train; "
    "and sample_skeleton_test.csv and common_features_test.csv, likewise"
)


class Features(NamedTuple):
    """The M features of N lines, in file order."""

    row_M: np.ndarray
    code_M: np.ndarray
    id_M: np.ndarray
    value_M: np.ndarray


def prepare(source: Path, out: Path, progress: Progress) -> dict[str, int]:
    """Rows of each file written.

    Raises:
        InputError: names the file, and the line where one is broken.
    """
    files = {
        split: locate(
            [source, source / f"sample_{split}", source / split], [f"common_features_{split}.csv", f"sample_skeleton_{split}.csv"], LAYOUT
        )
        for split in ("train", "test")
    }
    meter = Meter([path for paths in files.values() for path in paths], progress)
    with Outputs(out, ["train.parquet", "valid.parquet", "test.parquet"]) as outputs:
        for split, (common_file, skeleton) in files.items():
            common = _read_common(common_file, meter)
            for part in read_parts(skeleton, partial(_parse_skeleton, common=common), meter):
                held_out = part.table["__group"].to_numpy() == 0 if split == "train" else np.zeros(len(part.table), bool)
                rows = part.table.drop_columns(["__group"])
                outputs.write("valid.parquet", rows.filter(pa.array(held_out)))
                outputs.write(f"{split}.parquet", rows.filter(pa.array(~held_out)))
            del common
    return outputs.counts


def _read_common(path: Path, meter: Meter) -> pa.Table:
    """Index, ids and histories of the users, each column in one piece."""
    parts = pa.concat_tables([part.table for part in read_parts(path, _parse_common, meter)])
    columns = {}
    for name in parts.column_names:
        columns[name] = parts[name].combine_chunks()
        parts = parts.drop_columns([name])
    return pa.table(columns)


def _parse_common(lines: bytes) -> pa.Table:
    table = parse_csv(lines, Layout(tuple(COMMON), COMMON, frozenset(["feature_list"]), quoted=False))
    features = _features(table, USER_IDS | USER_LISTS)
    columns = {"common_feature_index": table["common_feature_index"]}
    columns |= {name: _ids(features, field, len(table)) for field, name in USER_IDS.items()}
    columns |= {name: _list(features, field, len(table)) for field, name in USER_LISTS.items()}
    return pa.table(columns)


def _parse_skeleton(lines: bytes, common: pa.Table) -> pa.Table:
    table = parse_csv(lines, Layout(tuple(SKELETON), SKELETON, frozenset(["feature_list"]), quoted=False))
    check_flags(table, ["click", "conversion"])
    index = table["common_feature_index"].combine_chunks()
    user = pc.index_in(index, value_set=common["common_feature_index"].combine_chunks())
    if user.null_count:
        raise ValueError(f"index {index.filter(user.is_null())[0].as_py()} is not in the file of common features")
    features = _features(table, ITEM_IDS | ITEM_LISTS | COMBINATIONS | CONTEXT_IDS)
    columns = {name: table[name] for name in ("sample_id", "click", "conversion")}
    users = common.drop_columns(["common_feature_index"]).take(user)
    columns |= {name: users[name] for name in users.column_names}
    columns |= {name: _ids(features, field, len(table)) for field, name in (ITEM_IDS | COMBINATIONS | CONTEXT_IDS).items()}
    columns |= {name: _list(features, field, len(table)) for field, name in ITEM_LISTS.items()}
    columns |= {f"{name}_strength": _values(features, field, len(table)) for field, name in COMBINATIONS.items()}
    columns["__group"] = pa.array((string_codes(index) % np.uint64(VALID_ONE_IN)).astype(np.int64))
    possible = pc.or_(pc.equal(table["click"], 1), pc.equal(table["conversion"], 0))
    return pa.table(columns).filter(possible)


def _features(table: pa.Table, known: dict[str, str]) -> Features:
    """The feature lists, apart.

    Raises:
        ValueError: a list that is no list of known fields, or not as long as its line says.
    """
    texts = table["feature_list"].combine_chunks().fill_null("")
    length_N = np.where(pc.equal(texts, "").to_numpy(zero_copy_only=False), 0, pc.count_substring(texts, "\x01").to_numpy() + 1)
    wrong = np.flatnonzero(length_N != table["feature_num"].to_numpy())
    if len(wrong):
        raise ValueError(f"{table['feature_num'][int(wrong[0])].as_py()} features are announced, {length_N[wrong[0]]} are there")
    # As lines of a CSV file the features are parsed without a loop over them.
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts), "\x01")[0]
    try:
        tokens = parse_csv(joined.as_buffer().to_pybytes().translate(_SEPARATORS), Layout(tuple(TOKENS), TOKENS, quoted=False))
    except ValueError as error:
        raise ValueError(f"features are 'field \\x02 id \\x03 value': {error}") from error
    if len(tokens) != length_N.sum():
        raise ValueError("an empty feature")
    code_M = pc.index_in(tokens["field"], value_set=pa.array(list(FIELDS)))
    strange = tokens["field"].filter(pc.invert(pc.is_in(tokens["field"], value_set=pa.array(list(known)))))
    if len(strange):
        raise ValueError(f"field {strange[0].as_py()} is none of {', '.join(known)}")
    row_M = np.repeat(np.arange(len(texts)), length_N)
    return Features(row_M, code_M.to_numpy(), tokens["id"].to_numpy(), tokens["value"].to_numpy())


def _ids(features: Features, field: str, num_rows: int) -> pa.Array:
    """The field's id in each row, the last where there are several, or null."""
    chosen = features.code_M == _CODES[field]
    id_N, lacks_N = np.zeros(num_rows, np.int32), np.ones(num_rows, bool)
    id_N[features.row_M[chosen]] = features.id_M[chosen]
    lacks_N[features.row_M[chosen]] = False
    return pa.array(id_N, mask=lacks_N)


def _values(features: Features, field: str, num_rows: int) -> pa.Array:
    chosen = features.code_M == _CODES[field]
    value_N = np.zeros(num_rows, np.float32)
    value_N[features.row_M[chosen]] = features.value_M[chosen]
    return pa.array(value_N)


def _list(features: Features, field: str, num_rows: int) -> pa.Array:
    """The field's ids in each row by ascending value, ties in file order: the last HISTORY of them."""
    chosen = features.code_M == _CODES[field]
    row_K, id_K = features.row_M[chosen], features.id_M[chosen]
    order = np.lexsort((features.value_M[chosen], row_K))
    row_K, id_K = row_K[order], id_K[order]
    kept = np.searchsorted(row_K, row_K, "right") - np.arange(len(row_K)) <= HISTORY
    offsets = np.searchsorted(row_K[kept], np.arange(num_rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(id_K[kept]))
