"""A row group read in slices, in any order and from any place on, holds exactly what it holds when it is read whole."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.parquet.files import SliceReader, read_slices
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

ROWS, COLUMNS = 240, ["user", "page", "kind", "seen", "tags", "vector", "price"]
SCHEMA = Schema(
    DataSection(root="."),
    (TableIds(name="t", rows=9),),
    (Feature(name="user", kind="id", table="t"),),
    (Label(name="ctr", kind="binary", label="click"),),
)


def columns():
    pages = ["a", None, "", "é" * 9, "b" * 400]
    kinds = [pa.array([f"{part}{i % 5}" for i in range(ROWS // 3)]).dictionary_encode() for part in "xyz"]
    return {
        "user": pa.array([None if i % 11 == 3 else i * 7919 for i in range(ROWS)]),
        "page": [pages[i % 5] for i in range(ROWS)],
        "kind": pa.chunked_array(kinds),
        "seen": pa.array([None if i % 13 == 5 else [i] * (i * i % 7) for i in range(ROWS)], pa.list_(pa.int32())),
        "tags": pa.array([[f"tag {i % 3}", "t"][: i % 3] for i in range(ROWS)], pa.large_list(pa.dictionary(pa.int32(), pa.string()))),
        "vector": pa.array([[i / 3, -i] for i in range(ROWS)], pa.list_(pa.float32(), 2)),
        "price": pa.array([i / 3 for i in range(ROWS)]),
        "click": pa.array([0] * ROWS, pa.int8()),
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A file of three row groups with small pages, its listing, and its rows."""
    path = tmp_path_factory.mktemp("log") / "f.parquet"
    pq.write_table(pa.table(columns()), path, ROWS // 3, data_page_size=256, write_batch_size=8, write_page_checksum=True)
    listing = list_slices(SCHEMA, [str(path)], labels=True)
    rows = pq.read_table(path, columns=COLUMNS).to_pylist()
    assert [part.rows for part in listing.slices] == [ROWS // 3] * 3
    return listing.slices, rows


def cut(part, edges):
    """The row group cut at these rows."""
    edges = [0, *edges, part.rows]
    return [
        part._replace(start=start, first_row=part.first_row + start, rows=stop - start) for start, stop in pairwise(edges) if start < stop
    ]


cuts = st.lists(st.lists(st.integers(1, ROWS // 3 - 1), unique=True, max_size=6).map(sorted), min_size=3, max_size=3)


def sliced(whole, edges):
    return [part for group, its_edges in zip(whole, edges, strict=True) for part in cut(group, its_edges)]


def rows_of(rows, part):
    return rows[part.first_row : part.first_row + part.rows]


class TestAnyCut:
    @settings(deadline=None, max_examples=25)
    @given(cuts)
    def test_forwards(self, log, edges):
        whole, rows = log
        parts = sliced(whole, edges)
        read = list(read_slices(SCHEMA, parts, COLUMNS))
        assert [part for part, _ in read] == parts
        assert [row for _, table in read for row in table.to_pylist()] == rows
        assert all(table.column_names == COLUMNS for _, table in read)

    @settings(deadline=None, max_examples=25)
    @given(cuts, st.data())
    def test_in_any_order_with_gaps_and_again(self, log, edges, data):
        whole, rows = log
        parts = data.draw(st.lists(st.sampled_from(sliced(whole, edges)), min_size=1, max_size=8))
        reader = SliceReader(COLUMNS)
        for part in parts:
            assert reader.read(part).to_pylist() == rows_of(rows, part)

    @pytest.mark.parametrize("column", COLUMNS)
    def test_each_column_by_itself_from_the_middle_on(self, log, column):
        whole, rows = log
        reader = SliceReader([column])
        for part in sliced(whole, [[37, 41]] * 3)[1:]:
            assert reader.read(part).to_pylist() == [{column: row[column]} for row in rows_of(rows, part)]


class TestReader:
    def test_consecutive_slices_decode_a_row_group_once(self, log):
        whole, _ = log
        reader = SliceReader(["seen"])
        streams = [(reader.read(part), reader._stream[2])[1] for part in cut(whole[1], [10, 20, 60])]
        assert len(set(map(id, streams))) == 1 and streams[0].row == ROWS // 3
        reader.read(cut(whole[1], [10])[0])
        assert reader._stream[2] is not streams[0]

    def test_an_error_leaves_no_stream_behind(self, log):
        whole, rows = log
        reader = SliceReader(["user"])
        first, second, third = cut(whole[0], [20, 50])
        beyond = third._replace(rows=31)
        reader.read(first)
        with pytest.raises(InputError, match=r"row group 0 from row 50 holds 30 rows instead of 31"):
            reader.read(beyond)
        assert [row["user"] for row in reader.read(second).to_pylist()] == [row["user"] for row in rows_of(rows, second)]

    def test_a_slice_beyond_the_end(self, log):
        part = log[0][0]._replace(start=ROWS, rows=5)
        with pytest.raises(InputError, match=rf"row group 0 from row {ROWS} cannot be read \(the row group ends before"):
            SliceReader(["user"]).read(part)

    @pytest.mark.parametrize("kind", [pa.string_view(), pa.list_(pa.string_view())], ids=str)
    def test_string_views_come_as_strings(self, tmp_path, kind):
        values = [["a", "é" * 20], None, []] if pa.types.is_list(kind) else ["a", "é" * 20, None]
        table = pa.table({"user": [1, 2, 3], "views": pa.array(values, kind), "click": [0] * 3})
        pq.write_table(table, tmp_path / "f.parquet")
        (part,) = list_slices(SCHEMA, [f"{tmp_path}/f.parquet"], labels=True).slices
        read = SliceReader(["views"]).read(part)
        assert read.column(0).to_pylist() == values and "view" not in str(read.schema.field(0).type)
