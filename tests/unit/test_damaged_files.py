"""A flipped bit in any page, and a file that is cut off or no parquet, is named; with on_bad_file = "skip" its rows alone are left out."""

import zipfile
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.files import SliceReader
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.parquet.pages import check_lists, check_pages, page_header
from triptych.datasets.row_groups import Slice
from triptych.datasets.schema import DataSection, Feature, InputError, Label, Schema, TableIds

ROW_GROUP_ROWS, NUM_ROW_GROUPS = 1200, 3
NUM_ROWS = ROW_GROUP_ROWS * NUM_ROW_GROUPS
COLUMNS = ["user", "page", "seen", "price", "vector", "click"]
LONGEST = 5
HOW = {"whole": ROW_GROUP_ROWS, "sliced": 350}
"""Rows of a row group that are read at a time."""
SMALL_PAGES = {"compression": "zstd", "write_page_checksum": True, "data_page_size": 512, "write_batch_size": 64}


def schema(on_bad_file):
    return Schema(
        DataSection(root=".", batch_size=500, workers=0, on_bad_file=on_bad_file),
        tables=(TableIds(name="user", rows=10**6), TableIds(name="page", rows=500), TableIds(name="item", rows=60, ids="index")),
        features=(
            Feature(name="user", kind="id", table="user"),
            Feature(name="page", kind="id", table="page"),
            Feature(name="seen", kind="ids", table="item"),
            Feature(name="price", kind="dense", default=-1),
            Feature(name="vector", kind="vector", size=2),
        ),
        labels=(Label(name="ctr", kind="binary", label="click"),),
    )


def table(rng, num_rows):
    vectors = rng.random(2 * num_rows).astype(np.float32)
    return pa.table(
        {
            "user": rng.integers(0, 10**9, num_rows),
            "page": np.array(["home", "search", "feed"])[rng.integers(0, 3, num_rows)],
            "seen": [rng.integers(0, 60, length).tolist() for length in rng.integers(0, LONGEST + 1, num_rows)],
            "price": pa.array([None if row % 7 == 0 else float(row) for row in range(num_rows)]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), 2),
            "click": pa.array(rng.integers(0, 2, num_rows), pa.int8()),
        }
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file with many pages in every column chunk, and its bytes."""
    path = tmp_path_factory.mktemp("good") / "log.parquet"
    pq.write_table(table(np.random.default_rng(0), NUM_ROWS), path, row_group_size=ROW_GROUP_ROWS, **SMALL_PAGES)
    return path, path.read_bytes()


def cut(part, how):
    """The slices that a row group is read in."""
    starts = range(0, part.rows, HOW[how])
    return [part._replace(start=start, first_row=part.first_row + start, rows=min(HOW[how], part.rows - start)) for start in starts]


def read(path, on_bad_file, how="whole"):
    """All rows in file order, a line of numbers each, and what was left out."""
    the_schema = schema(on_bad_file)
    listing = list_slices(the_schema, [str(path)], labels=True)
    slices = [piece for part in listing.slices for piece in cut(part, how)]
    loader = Loader(Decoder(the_schema, Fitted()), slices, rank=0, world_size=1)
    return np.concatenate([lines(batch) for batch in loader.batches()]), loader.tally


def lines(batch):
    """Row number, weight, label, dense columns, and every feature's ids, padded with -1; [rows, columns]."""
    columns = [batch.row_B[:, None], batch.weight_B[:, None], batch.labels_BT, batch.dense_BD]
    padded = [np.asarray(column, np.float64) for column in columns]
    for name in batch.ids.keys():  # noqa: SIM118  a KeyedJaggedTensor is no dict
        ids = batch.ids[name]
        place = np.arange(LONGEST)[None, :] < ids.lengths().numpy()[:, None]
        matrix = np.full(place.shape, -1.0)
        matrix[place] = ids.values().numpy()
        padded.append(matrix)
    return np.concatenate(padded, axis=1)


def pages(path):
    """Row group, column, and where the header and the rest of every page begin and end."""
    metadata = pq.read_metadata(path)
    found = []
    with pa.OSFile(str(path)) as source:
        for number in range(NUM_ROW_GROUPS):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(number).column(index)
                at = chunk.dictionary_page_offset or chunk.data_page_offset
                end = at + chunk.total_compressed_size
                while at < end:
                    fields, header_bytes = page_header(source, at, end)
                    begin, stop = at + header_bytes, at + header_bytes + fields[3]
                    found.append((number, chunk.path_in_schema.split(".")[0], at, begin, stop))
                    at = stop
                assert at == end  # pages fill their chunk: nothing else in it could be damaged
    return found


def flip(path, content, position, bit):
    path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])


@pytest.fixture(scope="module")
def truth(good):
    whole, tally = read(good[0], "fail")
    sliced, _ = read(good[0], "fail", "sliced")
    assert np.array_equal(whole, sliced) and whole[:, 0].tolist() == list(range(NUM_ROWS)) and tally.skipped_rows == 0
    return whole


def refusal(path, how="whole"):
    with pytest.raises(InputError) as error:
        read(path, "fail", how)
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"{path}:"), line
    return line


FLIPS = [*range(30), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(30, 200))]


class TestFlippedBits:
    def test_the_log_is_worth_damaging(self, good):
        found = pages(good[0])
        assert {column for _, column, *_ in found} == set(COLUMNS)
        assert len(found) > 10 * len(COLUMNS) * NUM_ROW_GROUPS
        assert [part.rows for part in list_slices(schema("fail"), [str(good[0])], labels=True).slices] == [ROW_GROUP_ROWS] * NUM_ROW_GROUPS

    @pytest.mark.parametrize("how", list(HOW))
    @pytest.mark.parametrize("seed", FLIPS)
    def test_in_a_page_is_named_and_only_its_row_group_is_skipped(self, good, truth, tmp_path, seed, how):
        draw = Random(seed)
        number, _, _, begin, stop = draw.choice(pages(good[0]))
        path = tmp_path / "log.parquet"
        flip(path, good[1], draw.randrange(begin, stop), draw.randrange(8))
        assert f"row group {number}" in refusal(path, how)
        rows, tally = read(path, "skip", how)
        kept = rows[:, 0] >= 0
        assert np.array_equal(rows[kept], truth[kept])
        left_out = np.flatnonzero(~kept)
        assert set((left_out // ROW_GROUP_ROWS).tolist()) == {number}
        assert how == "sliced" or len(left_out) == ROW_GROUP_ROWS
        assert not rows[~kept, 1].any()  # they weigh nothing
        report = tally.report()["skipped"]
        assert (report["rows"], report["files"]) == (len(left_out), 1)
        assert all(reason.startswith(f"{path}: row group {number}") and "\n" not in reason for reason in report["reasons"])

    @pytest.mark.parametrize("how", list(HOW))
    @pytest.mark.parametrize("seed", FLIPS)
    def test_in_a_page_header_is_named_or_changes_nothing(self, good, truth, tmp_path, seed, how):
        """Checksums do not cover headers. Most of a header is statistics, which reading ignores: its first bytes are worth hitting."""
        draw = Random(seed)
        number, _, at, begin, _ = draw.choice(pages(good[0]))
        path = tmp_path / "log.parquet"
        flip(path, good[1], draw.randrange(at, min(begin, at + 24)), draw.randrange(8))
        rows, tally = read(path, "skip", how)
        kept = rows[:, 0] >= 0
        assert np.array_equal(rows[kept], truth[kept])
        assert tally.skipped_rows == NUM_ROWS - kept.sum()
        if not kept.all():
            assert f"row group {number}" in refusal(path, how)

    @pytest.mark.parametrize("seed", FLIPS)
    def test_in_the_footer_is_named_or_changes_nothing(self, good, truth, tmp_path, seed):
        draw, content = Random(seed), good[1]
        path = tmp_path / "log.parquet"
        length = int.from_bytes(content[-8:-4], "little") + 8
        flip(path, content, len(content) - draw.randrange(length) - 1, draw.randrange(8))
        try:
            rows, _ = read(path, "fail")
        except InputError as error:
            assert str(error).startswith(f"{path}:") and "\n" not in str(error)
        else:
            assert np.array_equal(rows, truth)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("how", list(HOW))
def test_a_page_that_says_it_is_of_another_type_shifts_no_rows(good, truth, tmp_path, column, how):
    """Arrow passes over a page of a type that it does not know, so that a column runs ahead of the others."""
    number, _, at, _, _ = [page for page in pages(good[0]) if page[1] == column][1]
    with pa.OSFile(str(good[0])) as source:
        assert page_header(source, at, at + 100)[0][1] == 0  # a data page: byte 1 of its header is the type, twice the number
    path = tmp_path / "log.parquet"
    flip(path, good[1], at + 1, 1)  # to an index page
    assert f"row group {number}" in refusal(path, how)
    rows, _ = read(path, "skip", how)
    kept = rows[:, 0] >= 0
    assert np.array_equal(rows[kept], truth[kept])


def test_a_page_that_says_it_holds_fewer_list_values_is_refused(good, tmp_path):
    """Arrow cuts the last list of such a page short and raises nothing."""
    path, caught = tmp_path / "log.parquet", 0
    for _, column, at, _, _ in pages(good[0]):
        count_at = good[1][at : at + 24].find(b"\x1c\x15")  # field 5, the data page header, a struct; and its field 1
        if column == "seen" and count_at > 0:
            for bit in range(1, 4):
                flip(path, good[1], at + count_at + 2, bit)
                refusal(path)
                caught += 1
    assert caught > 100


values = {
    "integers": (pa.int64(), st.none() | st.integers(-9, 9)),
    "strings": (pa.string(), st.none() | st.text("ab", max_size=3) | st.just("long" * 700)),
    "nothing": (pa.null(), st.none()),
    "lists": (pa.list_(pa.int32()), st.none() | st.lists(st.none() | st.integers(0, 9), max_size=4)),
    "lists of strings": (pa.large_list(pa.string()), st.lists(st.text("ab", max_size=3), max_size=4)),
    "vectors": (pa.list_(pa.float32(), 2), st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2)),
    "a.b": (pa.bool_(), st.booleans()),
}
ARROW = pa.schema({name: kind for name, (kind, _) in values.items()})
rows = st.lists(st.fixed_dictionaries({name: of for name, (_, of) in values.items()}), min_size=1, max_size=30)
WRITERS = st.fixed_dictionaries(
    {
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "use_dictionary": st.booleans(),
        "compression": st.sampled_from(["none", "snappy", "zstd"]),
        "data_page_size": st.sampled_from([20, 100, 10**6]),
        "write_batch_size": st.sampled_from([1, 10]),
        "dictionary_pagesize_limit": st.sampled_from([10, 10**6]),  # falls back to plain pages
        "write_page_checksum": st.booleans(),
    }
)


@settings(deadline=None, max_examples=40)
@given(rows, WRITERS, st.integers(1, 30))
def test_no_sound_file_is_refused(tmp_path_factory, rows, writer, row_group_size):
    path = tmp_path_factory.mktemp("log") / "sound.parquet"
    pq.write_table(pa.Table.from_pylist(rows, ARROW), path, row_group_size, **writer)
    with pq.ParquetFile(path) as file, pa.OSFile(str(path)) as source:
        for number in range(file.num_row_groups):
            check_lists(file.read_row_group(number), file.metadata, number)
            check_pages(source, file.metadata, number, list(values))


def test_a_row_group_that_ends_early_is_refused(good):
    listing = list_slices(schema("fail"), [str(good[0])], labels=True)
    beyond = listing.slices[0]._replace(start=ROW_GROUP_ROWS, rows=5)
    with pytest.raises(InputError, match="row group 0 from row 1200 cannot be read"):
        SliceReader(COLUMNS).read(Slice(*beyond))


class TestOtherFiles:
    @pytest.mark.parametrize("seed", range(50))
    def test_cut_off(self, good, tmp_path, seed):
        path = tmp_path / "log.parquet"
        path.write_bytes(good[1][: Random(seed).randrange(len(good[1]))])
        assert "not a readable parquet file" in refusal(path)

    @pytest.mark.parametrize("kind", ["empty", "text", "zip", "magic bytes alone"])
    def test_of_another_kind(self, tmp_path, kind):
        path = tmp_path / "log.parquet"
        path.write_bytes({"text": b"user,click\n17,1\n" * 99, "magic bytes alone": b"PAR1\0\0\0\0PAR1"}.get(kind, b""))
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("log.csv", "user,click\n17,1\n" * 99)
        assert "not a readable parquet file" in refusal(path)

    def test_a_folder_with_one_is_read_without_it(self, good, truth, tmp_path):
        the_schema = schema("skip")
        bad, sound = tmp_path / "a.parquet", tmp_path / "b.parquet"
        bad.write_bytes(good[1][:-1])
        sound.write_bytes(good[1])
        listing = list_slices(the_schema, [str(bad), str(sound)], labels=True)
        loader = Loader(Decoder(the_schema, Fitted()), listing.slices, rank=0, world_size=1)
        assert np.array_equal(np.concatenate([lines(batch) for batch in loader.batches()]), truth)
        assert list(listing.bad_files) == [str(bad)] and listing.bad_files[str(bad)][1].startswith(f"{bad}: not a readable parquet file")
