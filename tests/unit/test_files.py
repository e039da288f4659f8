"""Parquet files are found, listed and read whole, or refused in one line that names the file."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.files import find_files, is_there, list_row_groups, open_file, read_row_group
from triptych.datasets.schema import InputError

TABLE = pa.table(
    {
        "user": [f"user {i % 7}" for i in range(40)],
        "seen": [[i, i + 1] * (i % 3) for i in range(40)],
        "price": [i / 3 for i in range(40)],
        "click": [i % 2 for i in range(40)],
    }
)


def write(path, table=TABLE, row_group_size=20):
    pq.write_table(table, path, row_group_size, compression="zstd", write_page_checksum=True)
    return str(path)


def read(path):
    assert open_file(path).schema_arrow.names == TABLE.column_names
    return pa.concat_tables(read_row_group(group, TABLE.column_names)[0] for group in list_row_groups([path]))


def refusal(function, *args):
    with pytest.raises(InputError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestFinding:
    def test_a_name_a_folder_and_a_glob_find_files_in_order(self, tmp_path):
        for name in ("b.parquet", "a.parquet", "day/c.parquet", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert find_files(tmp_path, "b.parquet") == [f"{tmp_path}/b.parquet"]
        assert find_files("elsewhere", f"{tmp_path}/b.parquet") == [f"{tmp_path}/b.parquet"]
        assert find_files(tmp_path, "*.parquet") == [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"]
        assert find_files(tmp_path.parent, tmp_path.name) == [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet", f"{tmp_path}/day/c.parquet"]

    def test_globs_are_relative_to_the_root_or_absolute_and_take_the_files_of_folders(self, tmp_path, monkeypatch):
        for name in ("val1.parquet", "val2.parquet/part-0.parquet", "val2.parquet/deep/part-1.parquet", "val2.parquet/_SUCCESS"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        files = ["val1.parquet", "val2.parquet/deep/part-1.parquet", "val2.parquet/part-0.parquet"]
        for pattern in ("val*.parquet", f"{tmp_path}/val*.parquet", "**/*.parquet", "**", "."):
            wanted = files + (["val2.parquet/_SUCCESS"] if pattern == "**" else [])
            assert find_files(tmp_path, pattern) == sorted(f"{tmp_path}/{file}" for file in wanted)
        monkeypatch.chdir(tmp_path)
        assert find_files(".", "val*.parquet") == files
        assert is_there("val*.parquet") and is_there("val2.parquet") and not is_there("train*")

    def test_a_root_and_a_file_named_like_a_glob(self, tmp_path):
        (tmp_path / "[ab]").mkdir()
        (tmp_path / "[ab]/x[1].parquet").touch()
        for pattern in ("x[1].parquet", "*.parquet"):
            assert find_files(tmp_path / "[ab]", pattern) == [f"{tmp_path}/[ab]/x[1].parquet"]

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("trian.parquet", "no such file: {}/trian.parquet (did you mean 'train.parquet'?)"),
            ("*.csv", "no such file: {}/*.csv"),
            ("nowhere/f.parquet", "no such file: {}/nowhere/f.parquet"),
            ("empty", "{}/empty: a folder without parquet files"),
        ],
    )
    def test_nothing_to_find(self, tmp_path, pattern, message):
        (tmp_path / "train.parquet").touch()
        (tmp_path / "empty").mkdir()
        assert refusal(find_files, tmp_path, pattern) == message.format(tmp_path)


class TestListing:
    def test_row_groups_are_numbered_over_all_files(self, tmp_path):
        paths = [write(tmp_path / "a.parquet", row_group_size=30), write(tmp_path / "b.parquet", row_group_size=40)]
        assert list_row_groups(paths) == [(paths[0], 0, 0, 30), (paths[0], 1, 30, 10), (paths[1], 0, 40, 40)]

    def test_no_rows(self, tmp_path):
        path = write(tmp_path / "f.parquet", TABLE[:0])
        assert refusal(list_row_groups, [path]) == f"{path}: no rows"


class TestReading:
    def test_rows_are_those_written(self, tmp_path):
        assert read(write(tmp_path / "f.parquet", row_group_size=7)).equals(TABLE)

    def test_a_file_that_changed_since_it_was_listed(self, tmp_path):
        path = write(tmp_path / "f.parquet")
        group = list_row_groups([path])[1]
        assert refusal(read_row_group, group._replace(rows=9), ["user"]).startswith(f"{path}: row group 1 holds 20 rows instead of 9")
        assert refusal(read_row_group, group._replace(number=2), ["user"]).startswith(f"{path}: row group 2 cannot be read")

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"user,item\n1,2\n"], ids=["empty", "magic", "text"])
    def test_what_is_no_parquet_file(self, tmp_path, content):
        path = tmp_path / "f.parquet"
        path.write_bytes(content)
        assert refusal(list_row_groups, [str(path)]).startswith(f"{path}: not a readable parquet file (")

    def test_a_file_cut_anywhere_is_refused(self, tmp_path):
        write(tmp_path / "whole.parquet")
        whole = (tmp_path / "whole.parquet").read_bytes()
        for length in [*range(0, len(whole), 50), len(whole) - 1]:
            path = tmp_path / f"{length}.parquet"
            path.write_bytes(whole[:length])
            assert refusal(list_row_groups, [str(path)]).startswith(f"{path}: not a readable parquet file (")

    def test_a_flipped_bit_in_any_page_is_found_or_changes_nothing(self, tmp_path):
        write(tmp_path / "whole.parquet")
        whole = (tmp_path / "whole.parquet").read_bytes()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        found = 0
        for place in range(4, footer):
            path = tmp_path / f"{place}.parquet"
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
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
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                groups = list_row_groups([str(path)])
                names = [name for name in open_file(str(path)).schema_arrow.names if name in TABLE.column_names]
                tables = [read_row_group(group, names)[0] for group in groups]
            except InputError as error:
                assert str(error).startswith(str(path))
            else:
                assert sum(len(table) for table in tables) == len(TABLE)
