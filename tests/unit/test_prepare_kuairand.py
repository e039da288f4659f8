"""`prepare kuairand`: every row of the official CSVs, joined, with the histories of the weeks before, as a plain loop computes it."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.prepare import by_time, kuairand, text
from triptych.datasets.prepare.catalogue import prepare
from triptych.datasets.schema import InputError

LOG = [
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate",
    "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab",
]  # fmt: skip
USER = [
    "user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num",
    "follow_user_num_range", "fans_user_num", "fans_user_num_range", "friend_user_num", "friend_user_num_range", "register_days",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
]  # fmt: skip
VIDEO = [
    "video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration", "server_width",
    "server_height", "music_id", "music_type", "tag",
]  # fmt: skip
EARLY, LATE, RANDOM = (f"log_{name}_pure.csv" for name in ("standard_4_08_to_4_21", "standard_4_22_to_5_08", "random_4_22_to_5_08"))
NUM_USERS, NUM_VIDEOS = 12, 30
FLOATS = {"video_duration", "music_type", "onehot_feat4", *(f"onehot_feat{i}" for i in range(12, 18))}
COLUMNS = [
    *("user_id", "video_id", "date", "hourmin", "time_ms", "tab", "is_click", "long_view", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "is_profile_enter", "play_time_ms", "duration_ms", "user_active_degree", "is_live_streamer"),
    *("is_video_author", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days"),
    *(f"onehot_feat{i}" for i in range(18)),
    *("author_id", "video_type", "upload_type", "video_duration", "music_id", "music_type", "tag", "upload_dt"),
    *("watch_seq", "long_watch_seq"),
]


def users(rng):
    for user in range(NUM_USERS):
        row = {name: int(rng.integers(0, 9)) for name in USER}
        row |= {"user_id": user * 7, "user_active_degree": "full_active", "fans_user_num_range": "[10,100)", "register_days_range": "730+"}
        row |= {"follow_user_num_range": "(0,10]", "friend_user_num_range": "0", "is_live_streamer": -124}
        yield row | dict.fromkeys(FLOATS & set(USER), "" if user % 4 == 0 else f"{user % 3}.0")


def videos(rng):
    for video in reversed(range(NUM_VIDEOS)):
        row = {name: int(rng.integers(0, 10**6)) for name in VIDEO} | {"video_id": video, "music_id": 9_155_697_141 + video}
        row |= {
            "video_type": "NORMAL",
            "upload_dt": f"2022-04-{10 + video % 3}",
            "upload_type": "Web",
            "tag": ("", "39", "12,65")[video % 3],
        }
        yield row | {"video_duration": "" if video % 5 == 0 else "17200.0", "music_type": "" if video % 7 == 0 else "9.0"}


def impressions(rng, num_rows, days):
    for _ in range(num_rows):
        day = int(rng.choice(days))
        row = {name: int(rng.integers(0, 2)) for name in LOG} | {"date": day, "hourmin": int(rng.integers(0, 24)) * 100}
        row |= {
            "user_id": int(rng.integers(0, NUM_USERS)) * 7,
            "video_id": int(rng.integers(0, NUM_VIDEOS)),
            "tab": int(rng.integers(0, 15)),
        }
        # Few moments, so that some tie.
        row |= {"time_ms": 1_650_000_000_000 + day * 1000 + int(rng.integers(0, 40)), "play_time_ms": int(rng.integers(0, 10**5))}
        yield row | {"duration_ms": int(rng.integers(1, 10**5))}


def write(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.fixture
def source(tmp_path):
    """The official files, in the subfolder `data`."""
    return write_source(tmp_path / "raw", 300)


def write_source(folder, num_rows):
    rng, data = np.random.default_rng(1), folder / "data"
    data.mkdir(parents=True)
    early, late = [*range(20220408, 20220422)], [*range(20220422, 20220431), *range(20220501, 20220509)]
    write(data / "user_features_pure.csv", USER, list(users(rng)))
    write(data / "video_features_basic_pure.csv", VIDEO, list(videos(rng)))
    write(data / EARLY, LOG, list(impressions(rng, 2 * num_rows, early)))
    write(data / LATE, LOG, list(impressions(rng, 3 * num_rows, late)))
    write(data / RANDOM, LOG, list(impressions(rng, num_rows, late)))
    return folder


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def value(name, text):
    if name in ("watch_seq", "long_watch_seq"):
        return text
    if name == "tag":
        return [int(tag) for tag in text.split(",") if tag]
    if name in ("user_active_degree", "video_type", "upload_type", "upload_dt") or name.endswith("_range"):
        return text
    return (float(text) if text else None) if name in FLOATS else int(text)


def naive(source):
    """Rows of each output file, from the CSVs alone."""
    data = source / "data"
    by_user = {row["user_id"]: row for row in read(data / "user_features_pure.csv")}
    by_video = {row["video_id"]: row for row in read(data / "video_features_basic_pure.csv")}
    for user in by_user.values():
        early = sorted((row for row in read(data / EARLY) if row["user_id"] == user["user_id"]), key=lambda row: int(row["time_ms"]))
        user["watch_seq"] = [int(row["video_id"]) for row in early if row["is_click"] == "1"][-20:]
        user["long_watch_seq"] = [int(row["video_id"]) for row in early if row["long_view"] == "1"][-20:]
    files = {"train": [], "valid": [], "test": [], "random": [], "items": []}
    for log in (LATE, RANDOM):
        for row in sorted(read(data / log), key=lambda row: int(row["time_ms"])):
            split = "train" if row["date"] < "20220505" else "valid" if row["date"] < "20220507" else "test"
            joined = by_user[row["user_id"]] | by_video[row["video_id"]] | row
            if log == LATE or split == "test":
                files[split if log == LATE else "random"].append({name: value(name, joined[name]) for name in COLUMNS})
    for video in sorted(by_video.values(), key=lambda row: int(row["video_id"])):
        files["items"].append({name: value(name, video[name]) for name in ["video_id", *COLUMNS[-10:-2]]})
    return files


def silent(done, total):
    pass


class TestRows:
    @pytest.mark.parametrize("block_bytes", [1_000, 16 << 20])
    def test_every_row_is_what_a_loop_makes_of_the_csvs(self, source, tmp_path, monkeypatch, block_bytes):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(by_time, "RUN_ROWS", 150)
        monkeypatch.setattr(by_time, "CHUNK_ROWS", 11)
        seen = []
        counts = prepare("kuairand", source, tmp_path / "out", lambda done, total: seen.append((done, total)))
        expected = naive(source)
        for name, rows in expected.items():
            table = pq.read_table(tmp_path / "out" / f"{name}.parquet")
            assert table.to_pylist() == rows
            assert counts[f"{name}.parquet"] == len(rows) > 0
        assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in (source / "data").iterdir())
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(counts)

    def test_names_and_types(self, source, tmp_path):
        prepare("kuairand", source / "data", tmp_path / "out", silent)
        schema = pq.read_schema(tmp_path / "out" / "train.parquet")
        assert schema.names == COLUMNS
        text_columns = {"user_active_degree", "video_type", "upload_type", "upload_dt", *(n for n in COLUMNS if n.endswith("_range"))}
        lists = {"tag", "watch_seq", "long_watch_seq"}
        for field in schema:
            expected = pa.large_string() if field.name in text_columns else pa.float64() if field.name in FLOATS else pa.int64()
            expected = pa.int32() if field.name == "hourmin" else pa.list_(pa.int64()) if field.name in lists else expected
            assert field.type == expected, field.name

    def test_memory_does_not_grow_with_the_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 12)
        monkeypatch.setattr(text, "ROW_GROUP_ROWS", 100)
        monkeypatch.setattr(by_time, "RUN_ROWS", 200)
        monkeypatch.setattr(by_time, "CHUNK_ROWS", 10)
        most = {}
        for num_rows in (400, 2_400):
            source, before, held = write_source(tmp_path / str(num_rows), num_rows), pa.total_allocated_bytes(), []
            prepare("kuairand", source, tmp_path / f"out-{num_rows}", lambda *_, b=before, h=held: h.append(pa.total_allocated_bytes() - b))
            most[num_rows] = max(held)
        assert most[2_400] < 2 * most[400]


class TestRefusals:
    def replace(self, source, name, line, old, new):
        path = source / "data" / name
        lines = path.read_text().split("\n")
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)
        path.write_text("\n".join(lines))

    def refused(self, source, tmp_path):
        with pytest.raises(InputError) as error:
            prepare("kuairand", source, tmp_path / "out", silent)
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
        return str(error.value)

    def test_a_missing_file(self, source, tmp_path):
        (source / "data" / EARLY).unlink()
        assert f"no {EARLY}; the official layout is KuaiRand-Pure's" in self.refused(source, tmp_path)

    def test_a_renamed_column(self, source, tmp_path):
        self.replace(source, LATE, 1, "is_click", "clicked")
        assert f"{LATE}: not the official columns: no 'is_click' (did you mean 'clicked'?); surplus 'clicked'" in self.refused(
            source, tmp_path
        )

    @pytest.mark.parametrize("name", [EARLY, LATE, RANDOM])
    def test_a_broken_line(self, source, tmp_path, name):
        self.replace(source, name, 77, ",", ",,")
        assert f"{name}: line 77: " in self.refused(source, tmp_path)

    @pytest.mark.parametrize(
        ("place", "new", "reason"),
        [
            (0, "5", "user_id 5 is not in user_features_pure.csv"),
            (1, "99", "video_id 99 is not in video_features_basic_pure.csv"),
            (2, "20220421", "date 20220421 is none of the days that the file's name says"),
            (5, "2", "column 'is_click' must be 0 or 1, but holds 2"),
        ],
    )
    def test_a_wrong_value(self, source, tmp_path, place, new, reason):
        path = source / "data" / LATE
        lines = path.read_text().split("\n")
        values = lines[101].split(",")
        lines[101] = ",".join([*values[:place], new, *values[place + 1 :]])
        path.write_text("\n".join(lines))
        assert self.refused(source, tmp_path) == f"{path}: line 102: {reason}"

    def test_a_user_twice(self, source, tmp_path):
        path = source / "data" / "user_features_pure.csv"
        path.write_text(path.read_text() + path.read_text().split("\n")[3] + "\n")
        assert f"{path}: user_id 14 occurs 2 times" in self.refused(source, tmp_path)

    def test_a_tag_that_is_no_number(self, source, tmp_path):
        self.replace(source, "video_features_basic_pure.csv", 2, '"12,65"', '"12,x"')
        assert "video_features_basic_pure.csv: line 2: column 'tag': " in self.refused(source, tmp_path)

    def test_no_rows_on_the_test_days(self, source, tmp_path):
        path = source / "data" / LATE
        path.write_text("\n".join(line for line in path.read_text().split("\n") if ",2022050" not in line or line[0] == "u"))
        assert "valid.parquet would have no rows" in self.refused(source, tmp_path)


def test_histories_end_before_the_first_day_of_training():
    assert kuairand.FIRST_DAY == 20220422 and "4_08_to_4_21" in kuairand.EARLY
