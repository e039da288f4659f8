"""Parquet files are listed, cut to fit in memory and read whole, or refused in one line that names the file."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.parquet.files import open_file, read_slices
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import Slice
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

TABLE = pa.table(
    {
        "user": [f"user {i % 7}" for i in range(40)],
        "seen": [[i, i + 1] * (i % 3) for i in range(40)],
        "price": [i / 3 for i in range(40)],
        "click": [i % 2 for i in range(40)],
    }
)


def schema_of(root=".", **data):
    features = (
        Feature(name="user", kind="id", table="t"),
        Feature(name="seen", kind="ids", table="t"),
        Feature(name="price", kind="dense"),
    )
    return Schema(
        DataSection(root=str(root), **data), (TableIds(name="t", rows=9),), features, (Label(name="ctr", kind="binary", label="click"),)
    )


def write(path, table=TABLE, row_group_size=20):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size, compression="zstd", write_page_checksum=True)
    return str(path)


def listed(*paths, schema=None):
    return list_slices(schema or schema_of(), paths, labels=True)


def read(path):
    assert open_file(path).schema_arrow.names == TABLE.column_names
    return pa.concat_tables(table for _, table in read_slices(schema_of(), listed(path).slices, TABLE.column_names))


def refusal(function, *args):
    with pytest.raises(InputError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


class TestListing:
    def test_rows_are_numbered_over_all_files(self, tmp_path):
        paths = [write(tmp_path / "a.parquet", row_group_size=30), write(tmp_path / "day/b.parquet", row_group_size=40)]
        listing = listed(*paths, schema=schema_of(tmp_path))
        a, b = dict.fromkeys(part.file for part in listing.slices)
        assert listing.slices == [Slice(a, 0, 0, 0, 30), Slice(a, 1, 0, 30, 10), Slice(b, 0, 0, 40, 40)]
        assert [(file.path, file.name, file.size) for file in (a, b)] == [
            (paths[0], "a.parquet", (tmp_path / "a.parquet").stat().st_size),
            (paths[1], "day/b.parquet", (tmp_path / "day/b.parquet").stat().st_size),
        ]
        assert [str(part) for part in listing.slices[:2]] == [f"{paths[0]}: row group 0", f"{paths[0]}: row group 1"]
        assert listing.num_rows == 80 and listing.bad_files == {}
        assert listing.types.families["seen"] == ("lists of integers", paths[0])

    def test_a_footer_larger_than_what_is_read_at_first(self, tmp_path):
        wide = pa.table({**{name: TABLE[name] for name in TABLE.column_names}, **{f"spare {i:04d}": [i] * 40 for i in range(1200)}})
        path = write(tmp_path / "f.parquet", wide)
        assert int.from_bytes((tmp_path / "f.parquet").read_bytes()[-8:-4], "little") > 1 << 16
        assert pa.concat_tables(table for _, table in read_slices(schema_of(), listed(path).slices, TABLE.column_names)).equals(TABLE)

    def test_no_rows(self, tmp_path):
        path = write(tmp_path / "f.parquet", TABLE[:0])
        assert refusal(listed, path) == f"{path}: no rows"


class TestMemory:
    """Row groups that would not fit beside the others that are open are cut."""

    def cut(self, tmp_path, column="seen", **data):
        """The rows of each slice, by row group, of a file of two row groups of 300 and 100 rows with a wide list column."""
        table = pa.table(
            {
                "user": list(range(400)), column: [[i] * 38 for i in range(400)], "price": [0.5] * 400, "click": [0] * 400
            }
        )  # fmt: skip
        path = write(tmp_path / "f.parquet", table, 300)
        schema = schema_of(**data)
        features = tuple(feature.model_copy(update={"column": column}) if feature.kind == "ids" else feature for feature in schema.features)
        listing = list_slices(Schema(schema.data, schema.tables, features, schema.labels), [path], labels=True)
        for before, after in pairwise(listing.slices):
            assert after.first_row == before.first_row + before.rows
            assert after.start == (before.start + before.rows if after.row_group == before.row_group else 0)
        return [[part.rows for part in listing.slices if part.row_group == number] for number in range(2)]

    def test_what_fits_stays_whole(self, tmp_path):
        assert self.cut(tmp_path) == [[300], [100]]
        assert self.cut(tmp_path, memory_mb=1, shuffle=False) == [[300], [100]]

    @pytest.mark.parametrize("column", ["seen", "seen.by", "a.b.c"])
    def test_a_row_group_that_does_not_is_cut_into_even_slices(self, tmp_path, column):
        # 2 open row groups, in memory five times each: 104857 bytes. A list takes 8 * 39 bytes a row, others 8 each.
        bytes_a_row = 8 * 39 + 3 * 8
        assert 300 * bytes_a_row <= (1 << 20) // 10 < 500 * bytes_a_row
        assert self.cut(tmp_path, column, memory_mb=1) == [[300], [100]]
        many = pa.table({"user": [1] * 600, column: [[1] * 38] * 600, "price": [0.5] * 600, "click": [0] * 600})
        schema = schema_of(memory_mb=1, shuffle_row_groups=1)
        features = tuple(feature.model_copy(update={"column": column}) if feature.kind == "ids" else feature for feature in schema.features)
        path = write(tmp_path / "many.parquet", many, 600)
        sliced = list_slices(Schema(schema.data, schema.tables, features, schema.labels), [path] * 3, labels=True).slices
        assert 600 * bytes_a_row <= (1 << 20) // 5
        assert [part.rows for part in sliced] == [600] * 3
        schema = Schema(schema.data.model_copy(update={"shuffle_row_groups": 3}), schema.tables, features, schema.labels)
        sliced = list_slices(schema, [path] * 3, labels=True).slices
        assert [(part.start, part.rows, part.first_row) for part in sliced[:4]] == [
            (0, 200, 0), (200, 200, 200), (400, 200, 400), (0, 200, 600)
        ]  # fmt: skip
        assert str(sliced[1]) == f"{path}: row group 0 from row 200"


class TestBadFiles:
    def test_they_are_left_out_with_their_reasons_where_the_recipe_says_skip(self, tmp_path, caplog):
        good = [write(tmp_path / "a.parquet"), write(tmp_path / "d.parquet")]
        text, other_type = write(tmp_path / "b.parquet"), write(tmp_path / "c.parquet", TABLE.set_column(0, "user", pa.array(range(40))))
        (tmp_path / "b.parquet").write_bytes(b"user,item\n1,2\n")
        listing = listed(good[0], text, other_type, good[1], schema=schema_of(on_bad_file="skip"))
        assert [part.file.path for part in listing.slices] == [good[0]] * 2 + [good[1]] * 2
        assert [part.first_row for part in listing.slices] == [0, 20, 40, 60]
        assert listing.bad_files[text][1].startswith(f"{text}: not a readable parquet file (")
        assert listing.bad_files[other_type][1].startswith(f"{other_type}: column 'user' holds integers, but strings in {good[0]}; ")
        assert [record.getMessage() for record in caplog.records] == [
            f"skipped a file: {reason}" for _, reason in listing.bad_files.values()
        ]

    def test_where_all_are_bad_the_last_is_an_error(self, tmp_path):
        for name in ("a.parquet", "b.parquet"):
            (tmp_path / name).write_bytes(b"")
        paths = [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"]
        with pytest.raises(InputError, match=r"b\.parquet: not a readable parquet file \(the file is empty\)"):
            listed(*paths, schema=schema_of(on_bad_file="skip"))
        assert refusal(listed, *paths) == f"{paths[0]}: not a readable parquet file (the file is empty)"

    def test_slices_that_cannot_be_read_are_left_out(self, tmp_path):
        path = write(tmp_path / "f.parquet", row_group_size=10)
        content, slices = (tmp_path / "f.parquet").read_bytes(), listed(path).slices
        offset = pq.read_metadata(path).row_group(2).column(0).dictionary_page_offset
        (tmp_path / "f.parquet").write_bytes(flipped(content, offset + 40))
        assert [part.row_group for part, _ in read_slices(schema_of(on_bad_file="skip"), slices, ["user"])] == [0, 1, 3]
        assert refusal(list, read_slices(schema_of(), slices, ["user"])).startswith(f"{path}: row group 2 cannot be read (")


class TestReading:
    def test_rows_are_those_written(self, tmp_path):
        assert read(write(tmp_path / "f.parquet", row_group_size=7)).equals(TABLE)

    @pytest.mark.parametrize(
        "change", [TABLE[:30], TABLE[::-1], TABLE.append_column("spare", TABLE["click"])], ids=["cut", "other", "more"]
    )
    def test_a_file_that_changed_since_it_was_listed(self, tmp_path, change):
        path = write(tmp_path / "f.parquet")
        slices = listed(path).slices
        write(tmp_path / "f.parquet", change)
        assert refusal(list, read_slices(schema_of(), slices, ["user"])) == f"{path}: the file changed since it was listed"

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"user,item\n1,2\n", b"x" * 100 + b"\xff\xff\xff\x7fPAR1"], ids=str)
    def test_what_is_no_parquet_file(self, tmp_path, content):
        path = tmp_path / "f.parquet"
        path.write_bytes(content)
        for function in (listed, open_file):
            assert refusal(function, str(path)).startswith(f"{path}: not a readable parquet file (")

    def test_a_file_cut_anywhere_is_refused(self, tmp_path):
        write(tmp_path / "whole.parquet")
        whole = (tmp_path / "whole.parquet").read_bytes()
        for length in [*range(0, len(whole), 50), len(whole) - 1]:
            path = tmp_path / f"{length}.parquet"
            path.write_bytes(whole[:length])
            assert refusal(listed, str(path)).startswith(f"{path}: not a readable parquet file (")

    def test_a_flipped_bit_in_any_page_is_found_or_changes_nothing(self, tmp_path):
        write(tmp_path / "whole.parquet")
        whole = (tmp_path / "whole.parquet").read_bytes()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        found = 0
        for place in range(4, footer):
            path = tmp_path / f"{place}.parquet"
            path.write_bytes(flipped(whole, place))
            try:
                assert read(str(path)).equals(TABLE)
            except InputError as error:
                assert str(error).startswith(f"{path}: row group ")
                found += 1
        assert found > footer // 2

    def test_a_flipped_bit_in_the_footer_loses_no_rows_and_ends_in_no_other_error(self, tmp_path):
        write(tmp_path / "whole.parquet")
        whole = (tmp_path / "whole.parquet").read_bytes()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        for place in range(footer, len(whole)):
            path = tmp_path / f"{place}.parquet"
            path.write_bytes(flipped(whole, place))
            try:
                listing = listed(str(path))
                tables = [table for _, table in read_slices(schema_of(), listing.slices, TABLE.column_names)]
            except InputError as error:
                assert str(error).startswith(str(path))
            else:
                assert sum(len(table) for table in tables) == listing.num_rows == len(TABLE)
