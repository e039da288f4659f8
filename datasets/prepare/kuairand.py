"""KuaiRand-Pure (Gao et al., CIKM 2022): Kuaishou's short video log -> train, valid, test, random and items.

Files and columns are those that the authors' page, kuairand.com, describes. What becomes of them:

- `train.parquet`   standard policy, 2022-04-22 to 05-04;  `valid.parquet` 05-05 and 05-06;  `test.parquet` 05-07 and 05-08.
- `random.parquet`  random policy on the test days: videos drawn uniformly, so that it judges without the policy's bias.
- `items.parquet`   the catalogue, by video_id.

Impressions carry the attributes of user and video, and two histories: the last 20 videos that the user clicked, and viewed long, in the
standard log of 04-08 to 04-21, before every row. The daily statistics of the videos are left out: they average over the days to predict.

Memory holds the users and videos with their histories, a block of text, and the rows of one sorted run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schema import InputError
from .by_time import sort_by_time
from .text import Layout, Meter, Outputs, Progress, check_flags, locate, parse_csv, read_header, read_parts

HISTORY = 20
FIRST_DAY, VALID_DAY, TEST_DAY, LAST_DAY = 20220422, 20220505, 20220507, 20220508
EARLY, STANDARD, RANDOM = "log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv", "log_random_4_22_to_5_08_pure.csv"
USERS, VIDEOS = "user_features_pure.csv", "video_features_basic_pure.csv"
LAYOUT = f"KuaiRand-Pure's: a folder, or its subfolder data, with {EARLY}, {STANDARD}, {RANDOM}, {USERS} and {VIDEOS}"

FLAGS = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter")
LOG_COLUMNS = (
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate",
    "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab",
)  # fmt: skip
LOG_TYPES = dict.fromkeys(
    ("user_id", "video_id", "date", "hourmin", "time_ms", "tab", *FLAGS, "play_time_ms", "duration_ms"), pa.int64()
) | {"hourmin": pa.int32()}
HISTORY_TYPES = dict.fromkeys(("user_id", "video_id", "date", "time_ms", "is_click", "long_view"), pa.int64())

_RANGES = ("follow_user_num", "fans_user_num", "friend_user_num")
_FLOAT_FEATURES = (4, 12, 13, 14, 15, 16, 17)  # which have gaps
USER_COLUMNS = (
    "user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
    *(name for count in _RANGES for name in (count, f"{count}_range")),
    "register_days", "register_days_range", *(f"onehot_feat{i}" for i in range(18)),
)  # fmt: skip
USER_TYPES = (
    {"user_id": pa.int64(), "user_active_degree": pa.large_string(), "is_live_streamer": pa.int64(), "is_video_author": pa.int64()}
    | {f"{count}_range": pa.large_string() for count in _RANGES}
    | {"register_days": pa.int64()}
    | {f"onehot_feat{i}": pa.float64() if i in _FLOAT_FEATURES else pa.int64() for i in range(18)}
)
VIDEO_COLUMNS = (
    "video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration", "server_width",
    "server_height", "music_id", "music_type", "tag",
)  # fmt: skip
VIDEO_TYPES = {
    "video_id": pa.int64(),
    "author_id": pa.int64(),
    "video_type": pa.large_string(),
    "upload_type": pa.large_string(),
    "video_duration": pa.float64(),
    "music_id": pa.int64(),
    "music_type": pa.float64(),
    "tag": pa.string(),
    "upload_dt": pa.large_string(),
}
_USER_GAPS = frozenset(f"onehot_feat{i}" for i in _FLOAT_FEATURES)
_VIDEO_GAPS = frozenset(("video_duration", "music_type", "tag"))


def prepare(source: Path, out: Path, progress: Progress) -> dict[str, int]:
    """Rows of each file written.

    Raises:
        InputError: names the file, and the line where one is broken.
    """
    paths = locate([source, source / "data", source / "KuaiRand-Pure" / "data"], [EARLY, STANDARD, RANDOM, USERS, VIDEOS], LAYOUT)
    early, standard, random, user_file, video_file = paths
    headers = {path: read_header(path, LOG_COLUMNS) for path in (early, standard, random)}
    meter = Meter(paths, progress)
    users = _entities(user_file, USER_COLUMNS, USER_TYPES, _USER_GAPS, meter)
    videos = _entities(video_file, VIDEO_COLUMNS, VIDEO_TYPES, _VIDEO_GAPS, meter)
    parse_early = partial(_parse_log, layout=Layout(headers[early], HISTORY_TYPES), users=users, videos=videos, days=(0, FIRST_DAY - 1))
    users = _with_histories(users, (part.table for part in read_parts(early, parse_early, meter, header=True)))
    with Outputs(out, ["train.parquet", "valid.parquet", "test.parquet", "random.parquet", "items.parquet"]) as outputs:
        outputs.write("items.parquet", videos.sort_by("video_id"))
        for path in (standard, random):
            layout = Layout(headers[path], LOG_TYPES)
            parse = partial(_parse_log, layout=layout, users=users, videos=videos, days=(FIRST_DAY, LAST_DAY))
            tables = (part.table for part in read_parts(path, parse, meter, header=True))
            if path == random:
                tables = (table.filter(pc.field("date") >= TEST_DAY) for table in tables)
            with tempfile.TemporaryDirectory(prefix=".sorting-", dir=out) as scratch:
                for rows in sort_by_time(tables, "time_ms", Path(scratch)):
                    _write(outputs, _joined(rows, users, videos), ["random.parquet"] * 3 if path == random else outputs.names)
    return outputs.counts


def _write(outputs: Outputs, rows: pa.Table, names: Sequence[str]) -> None:
    date_N = rows["date"].to_numpy()
    split_N = (date_N >= VALID_DAY).astype(int) + (date_N >= TEST_DAY)
    for i in np.unique(split_N):
        outputs.write(names[i], rows.filter(pa.array(split_N == i)))


def _entities(path: Path, columns: tuple[str, ...], types: dict[str, pa.DataType], gaps: frozenset[str], meter: Meter) -> pa.Table:
    """One row each; the first column is the id, which comes once."""
    layout = Layout(read_header(path, columns), types, gaps)

    def parse(lines: bytes) -> pa.Table:
        table = parse_csv(lines, layout)
        return table.set_column(table.column_names.index("tag"), "tag", _tags(table["tag"].combine_chunks())) if "tag" in types else table

    table = pa.concat_tables([part.table for part in read_parts(path, parse, meter, header=True)]).combine_chunks()
    times = table[columns[0]].value_counts()
    for entry in times.filter(pc.greater(pc.struct_field(times, "counts"), 1))[:1].to_pylist():
        raise InputError(f"{path}: {columns[0]} {entry['values']} occurs {entry['counts']} times; it must be there once")
    return table


def _tags(texts: pa.Array) -> pa.Array:
    """`12,65` -> [12, 65]; nothing -> []."""
    lists = pc.split_pattern(texts.fill_null(""), ",")
    length_N = np.where(pc.equal(texts.fill_null(""), "").to_numpy(zero_copy_only=False), 0, pc.list_value_length(lists).to_numpy())
    flat = pc.list_flatten(lists)
    try:
        tags = flat.filter(pc.not_equal(flat, "")).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"column 'tag': {error}") from error
    if len(tags) != length_N.sum():
        raise ValueError("column 'tag': an empty tag")
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32), tags)


def _parse_log(lines: bytes, layout: Layout, users: pa.Table, videos: pa.Table, days: tuple[int, int]) -> pa.Table:
    """Impressions, whose users and videos are known and whose days are the file's."""
    table = parse_csv(lines, layout)
    check_flags(table, [name for name in FLAGS if name in layout.types])
    date_N = table["date"].to_numpy()
    outside = date_N[(date_N < days[0]) | (date_N > days[1])]
    if len(outside):
        raise ValueError(f"date {outside[0]} is none of the days that the file's name says")
    for entities, name, file in ((users, "user_id", USERS), (videos, "video_id", VIDEOS)):
        unknown = table[name].filter(pc.invert(pc.is_in(table[name], value_set=entities[name].combine_chunks())))
        if len(unknown):
            raise ValueError(f"{name} {unknown[0].as_py()} is not in {file}")
    return table


class _Recent:
    """The last HISTORY videos of each user, by time; ties by order of arrival."""

    def __init__(self) -> None:
        self.user_M, self.time_M, self.video_M = (np.zeros(0, np.int64) for _ in range(3))

    def add(self, user_N: np.ndarray, time_N: np.ndarray, video_N: np.ndarray) -> None:
        user_M, time_M, video_M = (np.concatenate(pair) for pair in ((self.user_M, user_N), (self.time_M, time_N), (self.video_M, video_N)))
        order = np.lexsort((time_M, user_M))
        user_M = user_M[order]
        from_end_M = np.searchsorted(user_M, user_M, "right") - np.arange(len(user_M))
        kept = from_end_M <= HISTORY
        self.user_M, self.time_M, self.video_M = user_M[kept], time_M[order][kept], video_M[order][kept]

    def lists(self, num_users: int) -> pa.Array:
        offsets = np.searchsorted(self.user_M, np.arange(num_users + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(self.video_M))


def _with_histories(users: pa.Table, tables: Iterator[pa.Table]) -> pa.Table:
    recent = {"is_click": _Recent(), "long_view": _Recent()}
    for table in tables:
        user_N = pc.index_in(table["user_id"], value_set=users["user_id"].combine_chunks()).to_numpy().astype(np.int64)
        time_N, video_N = table["time_ms"].to_numpy(), table["video_id"].to_numpy()
        for flag, videos in recent.items():
            chosen_N = table[flag].to_numpy() == 1
            videos.add(user_N[chosen_N], time_N[chosen_N], video_N[chosen_N])
    for name, flag in (("watch_seq", "is_click"), ("long_watch_seq", "long_view")):
        users = users.append_column(name, recent[flag].lists(len(users)))
    return users


def _joined(rows: pa.Table, users: pa.Table, videos: pa.Table) -> pa.Table:
    """Impressions with the columns of user and video; histories last."""
    for entities in (users.drop_columns(["watch_seq", "long_watch_seq"]), videos, users.select(["user_id", "watch_seq", "long_watch_seq"])):
        name = entities.column_names[0]
        found = entities.take(pc.index_in(rows[name], value_set=entities[name].combine_chunks()))
        for column in entities.column_names[1:]:
            rows = rows.append_column(column, found[column])
    return rows
