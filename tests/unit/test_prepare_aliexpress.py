"""`prepare aliexpress`: every row of MTReclib's CSVs, the tail of train held out, countries told apart."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.datasets.prepare import text
from triptych.datasets.prepare.catalogue import prepare
from triptych.datasets.schema import InputError

HEADER = ["search_id", *(f"categorical_{i}" for i in range(1, 17)), *(f"numerical_{i}" for i in range(1, 64)), "click", "conversion"]


def write(path, num_rows, seed):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(path, "w", newline="") as file:
        file.write(",".join(HEADER) + "\n")
        for i in range(num_rows):
            click = int(rng.integers(0, 2))
            numbers = [repr(float(x)) for x in rng.random(63).round(6)]
            file.write(",".join([str(i // 3), *map(str, rng.integers(0, 90, 16)), *numbers, str(click), str(click * (i % 2))]) + "\n")


@pytest.fixture
def source(tmp_path):
    for seed, country in enumerate(("NL", "ES")):
        write(tmp_path / "raw" / f"AliExpress_{country}" / "train.csv", 120 + seed, seed)
        write(tmp_path / "raw" / f"AliExpress_{country}" / "test.csv", 40, seed + 10)
    return tmp_path / "raw"


def naive(source, folders):
    files = {"train": [], "valid": [], "test": []}
    for folder in folders:
        for split in ("train", "test"):
            path = source / folder / f"{split}.csv"
            lines, place = path.read_text().splitlines(keepends=True), 0
            for line, row in zip(lines, [None, *csv.DictReader(lines)], strict=True):
                if row is not None:
                    country = folder.removeprefix("AliExpress_")
                    values = {n: float(np.float32(v)) if n.startswith("num") else int(v) for n, v in row.items() if n != "search_id"}
                    values |= {"search_id": f"{country}-{row['search_id']}", "country": country}
                    in_tail = split == "train" and place >= path.stat().st_size * 0.95
                    files["valid" if in_tail else split].append(values)
                place += len(line)
    return files


def silent(done, total):
    pass


@pytest.mark.parametrize("block_bytes", [1_500, 16 << 20])
def test_every_row_is_what_a_loop_makes_of_the_csvs(source, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    counts = prepare("aliexpress", source, tmp_path / "out", silent)
    for name, rows in naive(source, ["AliExpress_ES", "AliExpress_NL"]).items():
        table = pq.read_table(tmp_path / "out" / f"{name}.parquet")
        assert table.to_pylist() == rows
        assert counts[f"{name}.parquet"] == len(rows) > 0
        assert table.column_names == [*HEADER, "country"]


def test_one_country_and_columns_in_another_order(source, tmp_path):
    path = source / "AliExpress_NL" / "train.csv"
    path.write_text("\n".join(",".join(reversed(line.split(","))) for line in path.read_text().splitlines()))
    expected = naive(source, ["AliExpress_NL"])
    prepare("aliexpress", source / "AliExpress_NL", tmp_path / "out", silent)
    for name, rows in expected.items():
        assert pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() == rows


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(text, "ROW_GROUP_ROWS", 50)
    most = {}
    for num_rows in (200, 1_600):
        write(tmp_path / str(num_rows) / "train.csv", num_rows, 0)
        write(tmp_path / str(num_rows) / "test.csv", num_rows, 1)
        before, held = pa.total_allocated_bytes(), []
        progress = lambda *_, b=before, h=held: h.append(pa.total_allocated_bytes() - b)  # noqa: E731
        prepare("aliexpress", tmp_path / str(num_rows), tmp_path / f"out-{num_rows}", progress)
        most[num_rows] = max(held)
    assert most[1_600] < 1.5 * most[200]


class TestRefusals:
    def refused(self, source, tmp_path):
        with pytest.raises(InputError) as error:
            prepare("aliexpress", source, tmp_path / "out", silent)
        return str(error.value)

    def test_a_country_without_test(self, source, tmp_path):
        (source / "AliExpress_ES" / "test.csv").unlink()
        assert "AliExpress_ES: no test.csv; the official layout is MTReclib's" in self.refused(source, tmp_path)

    def test_an_index_column(self, source, tmp_path):
        path = source / "AliExpress_ES" / "train.csv"
        path.write_text(",".join(["Unnamed: 0", *HEADER]) + "\n")
        assert self.refused(source, tmp_path) == f"{path}: not the official columns: surplus 'Unnamed: 0'"

    @pytest.mark.parametrize(
        ("old", "new", "reason"), [(",1,1\n", ",1,3\n", "'conversion' must be 0 or 1"), (",0,0\n", ",0\n", "Expected 82")]
    )
    def test_a_broken_line(self, source, tmp_path, old, new, reason):
        path = source / "AliExpress_NL" / "train.csv"
        lines = path.read_text().splitlines(keepends=True)
        number = next(i for i, line in enumerate(lines, 1) if line.endswith(old) and i > 50)
        lines[number - 1] = lines[number - 1].replace(old, new)
        path.write_text("".join(lines))
        message = self.refused(source, tmp_path)
        assert f"{path}: line {number}: " in message and reason in message

    def test_too_few_rows_to_hold_any_out(self, tmp_path):
        write(tmp_path / "raw" / "train.csv", 2, 0)
        write(tmp_path / "raw" / "test.csv", 2, 0)
        assert "valid.parquet would have no rows" in self.refused(tmp_path / "raw", tmp_path)

    def test_no_folder(self, tmp_path):
        assert "no such folder: " in self.refused(tmp_path / "nowhere", tmp_path)
