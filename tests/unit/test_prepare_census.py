"""`prepare census`: every row of UCI's files, three labels made of columns that are dropped, every tenth row held out."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.census_log import EDUCATIONS, LINES, NAMES, write
from triptych.datasets.prepare import text
from triptych.datasets.prepare.catalogue import prepare
from triptych.datasets.schema import InputError


def naive(lines):
    for i, line in enumerate(lines):
        texts = {name: value.removeprefix(" ") for name, value in zip(NAMES, line.split(","), strict=True)}
        row = {"row_id": i}
        for name, value in texts.items():
            if name not in ("education", "marital_stat", "instance_weight", "income"):
                row[name] = int(value) if value.isdigit() else value
        row["hisp_origin"] = None if row["hisp_origin"] == "NA" else row["hisp_origin"]
        row["label_income"] = int(texts["income"] == "50000+.")
        row["label_never_married"] = int(texts["marital_stat"] == "Never married")
        yield row | {"label_college": EDUCATIONS[texts["education"]]}


def silent(done, total):
    pass


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("block_bytes", [2_000, 16 << 20])
def test_every_row_is_what_a_loop_makes_of_the_files(tmp_path, monkeypatch, suffix, block_bytes):
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    data, test = (tmp_path / "raw" / f"census-income.{name}{suffix}" for name in ("data", "test"))
    write(data, 123, 0)
    write(test, 45, 1)
    seen = []
    counts = prepare("census", tmp_path / "raw", tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert counts == {"train.parquet": 111, "valid.parquet": 12, "test.parquet": 45}
    assert seen[-1] == (data.stat().st_size + test.stat().st_size,) * 2
    content = [gzip.decompress(path.read_bytes()) if suffix else path.read_bytes() for path in (data, test)]
    train, test = (list(naive(lines.decode().splitlines())) for lines in content)
    out = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() for name in ("train", "valid", "test")}
    assert out == {"train": [r for r in train if r["row_id"] % 10 != 9], "valid": [r for r in train if r["row_id"] % 10 == 9], "test": test}
    assert {row["citizenship"] for row in train} == {"Native- Born in the United States", "Foreign born- Not a citizen of U S "}


def test_types_are_plain(tmp_path):
    write(tmp_path / "raw" / "census-income.data", 20, 0)
    write(tmp_path / "raw" / "census-income.test", 20, 0)
    prepare("census", tmp_path / "raw", tmp_path / "out", silent)
    schema = pq.read_schema(tmp_path / "out" / "valid.parquet")
    assert {schema.field(name).type for name in ("row_id", "age", "det_ind_code", "year")} == {pa.int64()}
    assert {schema.field(name).type for name in ("race", "hisp_origin")} == {pa.large_string()}
    assert {schema.field(name).type for name in schema.names if name.startswith("label_")} == {pa.int8()}


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(text, "ROW_GROUP_ROWS", 20)
    most = {}
    for num_rows in (300, 2_400):
        write(tmp_path / str(num_rows) / "census-income.data", num_rows, 0)
        write(tmp_path / str(num_rows) / "census-income.test", num_rows, 1)
        before, held = pa.total_allocated_bytes(), []
        progress = lambda *_, b=before, h=held: h.append(pa.total_allocated_bytes() - b)  # noqa: E731
        prepare("census", tmp_path / str(num_rows), tmp_path / f"out-{num_rows}", progress)
        most[num_rows] = max(held)
    assert most[2_400] < 1.5 * most[300]


class TestRefusals:
    def refused(self, tmp_path):
        with pytest.raises(InputError) as error:
            prepare("census", tmp_path / "raw", tmp_path / "out", silent)
        return str(error.value)

    def test_a_missing_file(self, tmp_path):
        write(tmp_path / "raw" / "census-income.data", 5, 0)
        assert "no census-income.test; the official layout is UCI's: census-income.data and" in self.refused(tmp_path)

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            (" 95,", "", "Expected 42 columns, got 41: "),
            ("- 50000.", "<=50K", "column 'income' holds '<=50K', which is none of the official values"),
            ("Widowed", "widow", "column 'marital_stat' holds 'widow', which is none of the official values"),
            ("High school graduate", "HS-grad", "column 'education' holds 'HS-grad', which is none of the official values"),
            (" 73,", " old,", "column 'age': CSV conversion error to int64: invalid value 'old'"),
        ],
    )
    def test_a_broken_line(self, tmp_path, old, new, reason):
        write(tmp_path / "raw" / "census-income.test", 30, 0)
        path = tmp_path / "raw" / "census-income.data"
        path.write_text("\n".join([LINES[1]] * 17 + [LINES[0].replace(old, new)] + [LINES[1]] * 17))
        assert self.refused(tmp_path).startswith(f"{path}: line 18: {reason}")

    def test_a_name_that_is_no_log(self, tmp_path):
        with pytest.raises(
            InputError, match=r"no such log: cencus \(did you mean 'census'\?\); known are kuairand, aliccp, aliexpress, cens"
        ):
            prepare("cencus", tmp_path, tmp_path / "out", silent)

    def test_out_is_a_file(self, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(InputError, match="out is a file; prepare writes a folder"):
            prepare("census", tmp_path, tmp_path / "out", silent)
