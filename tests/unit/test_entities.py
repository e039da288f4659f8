"""The exported rows are the newest of each user or item: by time, then by position, over files and row groups."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets import entities
from triptych.datasets.entities import write_entities
from triptych.datasets.fitted import Fitted
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

some_examples = settings(deadline=None, max_examples=60)
integer_ids = st.integers(-3, 3)
string_ids = st.sampled_from(["", "a", "A", "é", "user 1", "10", "9"])


def schema(time="time"):
    return Schema(
        DataSection(root=".", time=time),
        tables=(TableIds(name="user", rows=9), TableIds(name="item", rows=9)),
        features=(
            Feature(name="item", kind="id", table="item", side="item"),
            Feature(name="user", column="user_id", kind="id", table="user", side="user"),
            Feature(name="seen", kind="ids", table="item", side="user"),
            Feature(name="age", kind="dense", side="user", default=0),
            Feature(name="hour", kind="dense"),
        ),
        labels=(Label(name="ctr", kind="binary", label="click"),),
    )


def rows(ids, times):
    """Rows as (id, time); the other columns follow from the position in `write_log`."""
    return st.lists(st.tuples(ids, times), max_size=9)


def write_log(folder, files, row_group_size, **types):
    """Write files of (id, time) rows. Returns the paths, and all rows with every column of the user's side."""
    position, paths, written = 0, [], []
    for number, pairs in enumerate(files):
        path = folder / f"part-{number}.parquet"
        log = [{"user_id": id_, "time": time, "age": position + i, "seen": [position + i] * (i % 3)} for i, (id_, time) in enumerate(pairs)]
        position += len(log)
        columns = {name: pa.array([row[name] for row in log], types.get(name)) for name in ("seen", "age", "user_id", "time")}
        pq.write_table(pa.table({**columns, "item": pa.array(range(len(log))), "click": pa.nulls(len(log))}), path, row_group_size)
        paths.append(str(path))
        written += log
    return paths, written


def naive_newest(written, *, by_time):
    newest = {}
    for row in written:
        held = newest.get(row["user_id"])
        if held is None or not by_time or held["time"] is None or (row["time"] is not None and row["time"] >= held["time"]):
            newest[row["user_id"]] = row
    return [newest[id_] for id_ in sorted(newest, key=lambda id_: id_.encode() if isinstance(id_, str) else id_)]


def exported(tmp_path, paths, time="time"):
    out = tmp_path / "vectors" / "users.parquet"
    count = write_entities(schema(time), Fitted(), paths, "user", out)
    table = pq.read_table(out)
    assert count == len(table)
    return table


class TestNewestRow:
    @some_examples
    @given(st.data(), st.booleans(), st.integers(1, 4))
    def test_it_is_what_a_loop_over_all_rows_keeps(self, tmp_path_factory, data, is_text, row_group_size):
        tmp_path = tmp_path_factory.mktemp("log")
        ids, kind = (string_ids, pa.string()) if is_text else (integer_ids, pa.int64())
        one_file = rows(ids, st.one_of(st.integers(0, 4), st.none()))
        files = data.draw(st.lists(one_file, min_size=1, max_size=4).filter(any))
        types = {"user_id": kind, "time": pa.int64(), "age": pa.int64(), "seen": pa.list_(pa.int64())}
        paths, written = write_log(tmp_path, files, row_group_size, **types)
        by_time = exported(tmp_path, paths).select(["user_id", "time", "age", "seen"]).to_pylist()
        assert by_time == naive_newest(written, by_time=True)
        by_position = exported(tmp_path, paths, time=None).to_pylist()
        assert by_position == [{k: v for k, v in row.items() if k != "time"} for row in naive_newest(written, by_time=False)]

    def test_row_groups_that_memory_cuts_change_nothing(self, tmp_path):
        users = [(row * 7 % 90, row % 11) for row in range(600)]
        paths, _ = write_log(tmp_path, [users], 300)
        wide = pq.read_table(paths[0]).set_column(0, "seen", pa.array([[row] * 300 for row in range(600)]))
        pq.write_table(wide, paths[0], 300)
        small = replace(schema(), data=DataSection(root=".", time="time", memory_mb=1))
        assert len(list_slices(small, paths, labels=False, skip_features=["item", "hour"]).slices) > 3
        for name, its_schema in (("whole", schema()), ("cut", small)):
            assert write_entities(its_schema, Fitted(), paths, "user", tmp_path / f"{name}.out") == 90
        assert pq.read_table(tmp_path / "cut.out").equals(pq.read_table(tmp_path / "whole.out"))

    def test_a_row_group_that_cannot_be_read_is_left_out_where_the_recipe_says_so(self, tmp_path):
        paths, _ = write_log(tmp_path, [[(1, 5), (2, 5), (1, 9), (3, 9)]], 2)
        pq.write_table(pq.read_table(paths[0]), paths[0], 2, write_page_checksum=True)
        skipping = replace(schema(), data=DataSection(root=".", time="time", on_bad_file="skip"))
        chunk = pq.read_metadata(paths[0]).row_group(1).column(2)
        content = bytearray((tmp_path / "part-0.parquet").read_bytes())
        content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1] ^= 1
        (tmp_path / "part-0.parquet").write_bytes(content)
        assert write_entities(skipping, Fitted(), paths, "user", tmp_path / "out") == 2
        with pytest.raises(InputError, match=r"part-0\.parquet: row group 1 cannot be read"):
            exported(tmp_path, paths)

    def test_a_file_without_the_time_column_goes_by_position(self, tmp_path):
        paths, _ = write_log(tmp_path, [[(1, 9), (2, 9), (1, 0)]], 10)
        assert exported(tmp_path, paths, time="when").column("age").to_pylist() == [2, 1]

    def test_it_carries_the_columns_of_its_side_alone(self, tmp_path):
        paths, _ = write_log(tmp_path, [[(1, 5)]], 10)
        assert exported(tmp_path, paths).column_names == ["user_id", "seen", "age", "time"]

    def test_row_groups_of_the_export_are_bounded(self, tmp_path):
        num_users = entities.ROW_GROUP_ROWS + 5
        paths, _ = write_log(tmp_path, [[(user, 0) for user in range(num_users)]], num_users)
        assert exported(tmp_path, paths).column("user_id").to_pylist() == list(range(num_users))
        metadata = pq.read_metadata(tmp_path / "vectors" / "users.parquet")
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [entities.ROW_GROUP_ROWS, 5]


class TestFilesThatDiffer:
    """Widths of one type may differ between files, as in training."""

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (pa.int32(), pa.int64()),
            (pa.int64(), pa.int8()),
            (pa.string(), pa.large_string()),
            (pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.string())),
            (pa.dictionary(pa.int8(), pa.string()), pa.string()),
            (pa.string_view(), pa.string()),
            (pa.string(), pa.string_view()),
        ],
        ids=str,
    )
    def test_types_of_ids_that_hold_the_same_values(self, tmp_path, first, second):
        is_number = pa.types.is_integer(first)
        one, two, three = (1, 2, 3) if is_number else ("1", "2", "3")
        (tmp_path / "b").mkdir()
        paths, _ = write_log(tmp_path, [[(one, 5), (two, 5)]], 10, user_id=first)
        more_paths, _ = write_log(tmp_path / "b", [[(three, 5), (one, 5), (two, 4)]], 2, user_id=second)
        table = exported(tmp_path, paths + more_paths)
        assert table.column("user_id").to_pylist() == [one, two, three]
        assert table.column("age").to_pylist() == [1, 1, 0]

    def test_a_column_that_is_all_null_in_one_file(self, tmp_path):
        (tmp_path / "b").mkdir()
        paths, _ = write_log(tmp_path, [[(1, 5), (2, 5)]], 10)
        pq.write_table(pa.table({"user_id": [2], "seen": pa.nulls(1), "age": pa.nulls(1), "time": [6]}), tmp_path / "b" / "x.parquet")
        assert exported(tmp_path, [*paths, str(tmp_path / "b" / "x.parquet")]).column("age").to_pylist() == [0, None]

    def test_numbers_in_one_file_and_text_in_another_are_refused(self, tmp_path):
        (tmp_path / "b").mkdir()
        paths, _ = write_log(tmp_path, [[(1, 5)]], 10)
        more_paths, _ = write_log(tmp_path / "b", [[("one", 5)]], 10)
        with pytest.raises(InputError, match=r"b/part-0\.parquet: column 'user_id' holds strings, but integers in .*part-0\.parquet"):
            exported(tmp_path, paths + more_paths)


class TestRefusals:
    def test_a_row_without_an_id(self, tmp_path):
        paths, _ = write_log(tmp_path, [[(1, 5), (2, 5), (3, 6), (None, 6)]], 2)
        with pytest.raises(InputError, match=r"part-0\.parquet: row group 1: column 'user_id' has 1 nulls; an entity needs an id"):
            exported(tmp_path, paths)

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("age", ": no column 'age' for feature 'age'"),
            ("user_id", ": no column 'user_id' for feature 'user'"),
            ("time", ": row group 0: no column 'time', which side 'user' needs"),
        ],
    )
    def test_a_column_that_a_later_file_lacks(self, tmp_path, missing, message):
        paths, _ = write_log(tmp_path, [[(1, 5)], [(1, 6)]], 2)
        pq.write_table(pq.read_table(paths[1]).drop_columns([missing]), tmp_path / "lacking.parquet")
        with pytest.raises(InputError) as refused:
            exported(tmp_path, [paths[0], str(tmp_path / "lacking.parquet")])
        assert str(refused.value) == f"{tmp_path}/lacking.parquet{message}"

    def test_files_without_rows(self, tmp_path):
        paths, _ = write_log(tmp_path, [[]], 2, user_id=pa.int64(), seen=pa.list_(pa.int64()), age=pa.int64(), time=pa.int64())
        with pytest.raises(InputError, match="no rows"):
            exported(tmp_path, paths)
