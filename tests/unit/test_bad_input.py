"""What is wrong in a log is refused in one line, or left out and counted, or read as documented: the cases of tests/bad_log.py."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_log import (
    BAD_ROW,
    CASES,
    DRIFT,
    FILE_OUT,
    FILE_ROWS,
    GROUP_OUT,
    REFUSED,
    ROW_GROUP_ROWS,
    all_values,
    at_bad_row,
    first_bytes,
    markdown_table,
    no_rows,
    schema,
    sound,
    untouched,
    without,
)
from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import ReadingPosition
from triptych.datasets.schema import InputError

REFUSALS = [case for case in CASES if case.same_as is None]
ACCEPTED = [case for case in CASES if case.same_as is not None]


def by_name(case):
    return f"{case.what}: {case.name}"


def write(folder, *changes):
    """Two files, each changed. Returns their paths, and how many rows the log has."""
    folder.mkdir()
    rows, paths = 0, []
    for number, change in enumerate(changes):
        path = folder / f"part-{number}.parquet"
        changed = change(sound(number))
        content = pa.table(sound(number) if isinstance(changed, int) else changed)
        pq.write_table(content, path, ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
        if isinstance(changed, int):
            path.write_bytes(path.read_bytes()[:changed])
        rows += len(content)
        paths.append(str(path))
    return paths, rows


def load(paths, on_bad_file):
    listing = list_slices(schema(on_bad_file), paths, labels=True)
    loader = Loader(Decoder(schema(on_bad_file), Fitted()), listing.slices, rank=0, world_size=1)
    loader.tally.bad_files |= listing.bad_files
    return loader


def read(paths, on_bad_file="fail"):
    """Everything that training sees, as one array a column; and the tally's report."""
    loader = load(paths, on_bad_file)
    seen: dict[str, list[np.ndarray]] = {}
    for batch in loader.batches():
        columns = {name: getattr(batch, name).numpy() for name in ("row_B", "dense_BD", "labels_BT", "known_BT", "weight_B")}
        for name in batch.ids.keys():  # noqa: SIM118  a KeyedJaggedTensor is no dict
            columns |= {f"{name} lengths": batch.ids[name].lengths().numpy(), name: batch.ids[name].values().numpy()}
        for name, values in columns.items():
            seen.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in seen.items()}, loader.tally.report()


@pytest.mark.parametrize("case", REFUSALS, ids=by_name)
def test_refused_in_one_line(case, tmp_path):
    paths, _ = write(tmp_path / "log", case.first, case.change)
    with pytest.raises(InputError) as error:
        read(paths)
    line = str(error.value)
    where = f"{paths[1]}: " + ("row group 1: " if case.happens == REFUSED else "")
    assert line.startswith(where) and "\n" not in line, line
    assert all(fragment in line for fragment in case.says), line
    if case.what == DRIFT:
        assert f" in {paths[0]}" in line


@pytest.mark.parametrize("case", REFUSALS, ids=by_name)
def test_skipped_and_counted(case, tmp_path):
    paths, _ = write(tmp_path / "log", case.first, case.change)
    expected, _ = read(write(tmp_path / "sound", untouched, untouched)[0])
    seen, report = read(paths, "skip")
    kept = FILE_ROWS if case.skip == FILE_OUT else FILE_ROWS + ROW_GROUP_ROWS
    assert seen["row_B"][seen["row_B"] >= 0].tolist() == list(range(kept))
    for name in ("dense_BD", "labels_BT", "known_BT", "weight_B"):
        assert np.array_equal(seen[name][:kept], expected[name][:kept])
        assert not seen[name][kept:].any()
    skipped = report["skipped"]
    # Of a file whose types are others', the rows are known; of one that lacks a column or is none, they are not.
    whole_file = FILE_ROWS if "in the next" in case.what else 0
    assert (skipped["rows"], skipped["files"]) == (ROW_GROUP_ROWS if case.skip == GROUP_OUT else whole_file, 1)
    assert len(skipped["reasons"]) == 1 and skipped["reasons"][0].startswith(paths[1])


@pytest.mark.parametrize("on_bad_file", ["fail", "skip"])
@pytest.mark.parametrize("case", ACCEPTED, ids=by_name)
def test_accepted(case, on_bad_file, tmp_path):
    paths, num_rows = write(tmp_path / "log", case.first, case.change)
    seen, report = read(paths, on_bad_file)
    plain, _ = write(tmp_path / "plain", untouched, case.same_as)
    expected, _ = read(plain[: num_rows // FILE_ROWS])  # an empty file might as well not be there
    assert seen.keys() == expected.keys()
    for name, values in seen.items():
        assert np.array_equal(values, expected[name]), name
    assert report["skipped"] == {"rows": 0, "files": 0, "reasons": []}
    negative, above = case.capped or (0, 0)
    assert report["capped"] == ({"dwell": {"negative": negative, "above_cap": above}} if case.capped else {})


def test_a_masked_null_teaches_its_task_alone_nothing(tmp_path):
    masked, _ = read(write(tmp_path / "log", untouched, at_bad_row("like", None))[0])
    expected, _ = read(write(tmp_path / "sound", untouched, untouched)[0])
    expected["known_BT"][FILE_ROWS + BAD_ROW, 1] = False
    assert all(np.array_equal(values, expected[name]) for name, values in masked.items())


def test_strings_have_no_place_in_an_index_table(tmp_path):
    text = all_values("item", str)
    paths, num_rows = write(tmp_path / "log", text, text)
    with pytest.raises(InputError, match=r"row group 0: column 'item' .* holds strings, .*; use ids = \"hash\""):
        read(paths)
    assert read(paths, "skip")[1]["skipped"]["rows"] == num_rows


@pytest.mark.parametrize("on_bad_file", ["fail", "skip"])
@pytest.mark.parametrize("change", [no_rows, first_bytes(0), without("click")])
def test_nothing_to_read_is_refused(tmp_path, change, on_bad_file):
    paths, _ = write(tmp_path / "log", change, change)
    with pytest.raises(InputError) as error:
        load(paths, on_bad_file)
    assert str(error.value).startswith((paths[0], paths[1])) and "\n" not in str(error.value)


def vanish(path):
    path.unlink()


def change_bytes(path):
    """Another file of other bytes."""
    pq.write_table(pa.table(sound(0)), path)


def change_rows(path):
    """Rows in another order: a file of the same size, or nearly."""
    pq.write_table(pa.table(sound(1)).take(np.arange(FILE_ROWS)[::-1]), path, ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)


@pytest.mark.parametrize("damage", [vanish, change_bytes, change_rows])
def test_a_file_that_vanishes_or_changes_while_training_reads(tmp_path, damage):
    expected, _ = read(write(tmp_path / "sound", untouched, untouched)[0])
    for on_bad_file in ("fail", "skip"):
        paths, _ = write(tmp_path / on_bad_file, untouched, untouched)
        loader = load(paths, on_bad_file)
        damage(tmp_path / on_bad_file / "part-1.parquet")
        if on_bad_file == "fail":
            with pytest.raises(InputError) as error:
                list(loader.batches())
            assert paths[1] in str(error.value) and "\n" not in str(error.value)
        else:
            row_N = np.concatenate([batch.row_B.numpy() for batch in loader.batches()])
            assert row_N[row_N >= 0].tolist() == expected["row_B"][:FILE_ROWS].tolist()
            assert (loader.tally.skipped_rows, loader.tally.report()["skipped"]["files"]) == (FILE_ROWS, 1)


def rename(path):
    path.rename(path.with_name("part-2.parquet"))


def add(path):
    pq.write_table(pa.table(sound(1)), path.with_name("part-2.parquet"))


@pytest.mark.parametrize("on_bad_file", ["fail", "skip"])
@pytest.mark.parametrize("damage", [vanish, change_bytes, change_rows, rename, add])
def test_files_that_changed_between_stop_and_resume_are_refused(tmp_path, damage, on_bad_file):
    paths, _ = write(tmp_path / "log", untouched, untouched)
    loader = load(paths, on_bad_file)
    state = loader.state_dict(loader.after_step(ReadingPosition()))
    assert load(paths, on_bad_file).load_state_dict(state) == ReadingPosition(0, 16)
    damage(tmp_path / "log" / "part-1.parquet")
    now = sorted(map(str, (tmp_path / "log").iterdir()))
    with pytest.raises(InputError, match="the training files changed since this checkpoint; restore them or start another run"):
        load(now, on_bad_file).load_state_dict(state)


def test_the_readme_has_this_table():
    assert markdown_table() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
