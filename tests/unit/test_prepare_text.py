"""Text logs are read in blocks of whole lines; a broken line is named; rows are sorted on disk; files appear when they are whole."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.prepare import by_time, text
from triptych.datasets.prepare.by_time import sort_by_time
from triptych.datasets.prepare.text import Layout, Meter, Outputs, locate, parse_csv, read_header, read_parts
from triptych.datasets.schema import InputError

LAYOUT = Layout(("name", "count", "share"), {"share": pa.float64(), "count": pa.int64(), "name": pa.string()}, frozenset(["name"]))


def parse(lines):
    return parse_csv(lines, LAYOUT)


def silent(done, total):
    pass


def read(path, **options):
    parts = list(read_parts(path, parse, Meter([path], silent), **options))
    return [(part.in_tail, row) for part in parts for row in part.table.to_pylist()]


def lines(num_rows):
    return [f'"a,{i}",{i},{i}.5' for i in range(num_rows)]


class TestBlocks:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 30), st.integers(20, 200), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans())
    def test_any_block_size_gives_the_same_rows(self, tmp_path_factory, num_rows, block_bytes, header, ends, newline, packed):
        path = tmp_path_factory.mktemp("text") / ("log.csv.gz" if packed else "log.csv")
        written = newline.join((["name,count,share"] if header else []) + lines(num_rows)) + (newline if ends else "")
        path.write_bytes(gzip.compress(written.encode()) if packed else written.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "BLOCK_BYTES", block_bytes)
            rows = read(path, header=header)
        assert rows == [(False, {"share": i + 0.5, "count": i, "name": f"a,{i}"}) for i in range(num_rows)]

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 40), st.integers(20, 500), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
    def test_the_tail_begins_at_the_first_line_in_it(self, tmp_path_factory, num_rows, block_bytes, tail):
        path = tmp_path_factory.mktemp("text") / "log.csv"
        path.write_text("name,count,share\n" + "".join(line + "\n" for line in lines(num_rows)))
        size, place, expected = path.stat().st_size, len("name,count,share\n"), []
        for line in lines(num_rows):
            expected.append(place >= size * (1 - tail))
            place += len(line) + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "BLOCK_BYTES", block_bytes)
            assert [in_tail for in_tail, _ in read(path, header=True, tail=tail)] == expected

    def test_progress_ends_at_the_bytes_of_the_file(self, tmp_path):
        path, seen = tmp_path / "log.csv", []
        path.write_text("\n".join(lines(100)))
        list(read_parts(path, parse, Meter([path], lambda done, total: seen.append((done, total)))))
        assert seen[-1] == (path.stat().st_size, path.stat().st_size)

    def test_only_one_block_is_in_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 14)
        path, most = tmp_path / "log.csv", {}
        for num_rows in (10_000, 80_000):
            path.write_text("\n".join(lines(num_rows)))
            before, held = pa.total_allocated_bytes(), []
            for _ in read_parts(path, parse, Meter([path], silent)):
                held.append(pa.total_allocated_bytes() - before)
            most[num_rows] = max(held)
        # The long file has over 100 blocks; Arrow may hold a block that was parsed until a thread of its own lets it go.
        assert path.stat().st_size > 40 * text.BLOCK_BYTES
        assert max(most.values()) < 4 * text.BLOCK_BYTES


class TestRefusals:
    @pytest.mark.parametrize(
        ("broken", "reason"),
        [
            ("b,x,1.0", "column 'count': CSV conversion error to int64: invalid value 'x'"),
            ("b,1", "Expected 3 columns, got 2: b,1"),
            ("b,1,1.0,2", "Expected 3 columns, got 4: b,1,1.0,2"),
            ("b,,1.0", "column 'count' is empty"),
            ("b,1,nan", "column 'share' holds NaN or infinity"),
            ("\udcff,1,1.0", "column 'name': "),
        ],
    )
    @pytest.mark.parametrize("place", [0, 1, 57, 199])
    @pytest.mark.parametrize("header", [False, True])
    def test_the_first_broken_line_is_named(self, tmp_path, monkeypatch, broken, reason, place, header):
        monkeypatch.setattr(text, "BLOCK_BYTES", 1_000)
        path = tmp_path / "log.csv"
        written = lines(200)
        written[place], written[199] = broken, broken
        whole = "\n".join((["name,count,share"] if header else []) + written)
        path.write_bytes(whole.encode(errors="surrogateescape"))
        with pytest.raises(InputError) as error:
            read(path, header=header)
        assert str(error.value).startswith(f"{path}: line {place + 1 + header}: {reason}")
        assert "\n" not in str(error.value)

    def test_a_line_without_an_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "BLOCK_BYTES", 1_000)
        (tmp_path / "log.csv").write_bytes(b"x" * 5_000)
        with pytest.raises(InputError, match=r"log\.csv: a line of more than"):
            read(tmp_path / "log.csv")

    @pytest.mark.parametrize("damaged", [b"no gzip at all", gzip.compress(b"a,1,1\n" * 500)[:-9], b"\x1f\x8b\x08\0" + b"\xff" * 40])
    def test_a_damaged_gz(self, tmp_path, damaged):
        (tmp_path / "log.csv.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"log\.csv\.gz: cannot be read"):
            read(tmp_path / "log.csv.gz")

    def test_columns_that_are_missing_surplus_or_repeated(self, tmp_path):
        path = tmp_path / "log.csv"
        path.write_text('name,cuont,extra,"share",share\n')
        with pytest.raises(InputError) as error:
            read_header(path, ["name", "count", "share"])
        assert str(error.value) == (
            f"{path}: not the official columns: no 'count' (did you mean 'cuont'?); surplus 'cuont', 'extra'; repeated 'share'"
        )

    def test_columns_may_stand_in_another_order(self, tmp_path):
        (tmp_path / "log.csv").write_bytes(b'\xef\xbb\xbf"share",name,count\r\n1.5,a,2\r\n')
        assert read_header(tmp_path / "log.csv", ["name", "count", "share"]) == ("share", "name", "count")

    def test_files_are_missing(self, tmp_path):
        (tmp_path / "b.csv").write_text("")
        with pytest.raises(InputError, match=r"no a\.csv, c\.csv; the official layout is abc"):
            locate([tmp_path], ["a.csv", "b.csv", "c.csv"], "abc")
        with pytest.raises(InputError, match=r"no such folder: .*nowhere; give the one with abc"):
            locate([tmp_path / "nowhere"], ["a.csv"], "abc")


class TestSortByTime:
    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.lists(st.integers(-3, 6), max_size=12), max_size=8), st.integers(1, 9), st.integers(1, 5))
    def test_it_is_a_stable_sort_of_all_rows(self, tmp_path_factory, tables, run_rows, chunk_rows):
        position, given_tables = 0, []
        for times in tables:
            given_tables.append(
                pa.table({"time": pa.array(times, pa.int64()), "row": pa.array(range(position, position + len(times)), pa.int64())})
            )
            position += len(times)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(by_time, "RUN_ROWS", run_rows)
            patch.setattr(by_time, "CHUNK_ROWS", chunk_rows)
            result = [row for t in sort_by_time(iter(given_tables), "time", tmp_path_factory.mktemp("runs")) for row in t.to_pylist()]
        everything = [row for table in given_tables for row in table.to_pylist()]
        assert result == sorted(everything, key=lambda row: row["time"])

    def test_memory_does_not_grow_with_the_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(by_time, "RUN_ROWS", 4_000)
        monkeypatch.setattr(by_time, "CHUNK_ROWS", 100)
        most = {}
        for num_rows in (16_000, 96_000):
            (tmp_path / str(num_rows)).mkdir()
            rng, before = np.random.default_rng(0), pa.total_allocated_bytes()
            tables = (pa.table({"time": rng.integers(0, 10**9, 1_000), "x": rng.random(1_000)}) for _ in range(num_rows // 1_000))
            held = [pa.total_allocated_bytes() - before for _ in sort_by_time(tables, "time", tmp_path / str(num_rows))]
            most[num_rows] = max(held)
        # 24 runs of 100 rows are in memory, not 96,000 rows of 24 bytes.
        assert most[96_000] < 0.5 * 96_000 * 24


class TestOutputs:
    def test_row_groups_are_full_but_the_last(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "ROW_GROUP_ROWS", 7)
        with Outputs(tmp_path / "new", ["a.parquet"]) as outputs:
            for start, stop in ((0, 3), (3, 3), (3, 30), (30, 31)):
                outputs.write("a.parquet", pa.table({"x": pa.array(range(start, stop), pa.int64())}))
        assert outputs.counts == {"a.parquet": 31}
        file = pq.ParquetFile(tmp_path / "new" / "a.parquet", page_checksum_verification=True)
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [7, 7, 7, 7, 3]
        assert file.read()["x"].to_pylist() == list(range(31))
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"

    def test_nothing_appears_when_it_fails(self, tmp_path):
        (tmp_path / "a.parquet").write_text("before")
        with pytest.raises(RuntimeError), Outputs(tmp_path, ["a.parquet", "b.parquet"]) as outputs:
            outputs.write("a.parquet", pa.table({"x": range(50_000)}))
            raise RuntimeError
        assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
        assert (tmp_path / "a.parquet").read_text() == "before"

    def test_a_file_without_rows_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"b\.parquet would have no rows"), Outputs(tmp_path, ["a.parquet", "b.parquet"]) as outputs:
            outputs.write("a.parquet", pa.table({"x": [1]}))
            outputs.write("b.parquet", pa.table({"x": pa.array([], pa.int64())}))
        assert list(tmp_path.iterdir()) == []
