"""Where reading stands is only good for the same files and order; what reading left out or changed is counted once."""

import json
import shutil
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.test_loader import SCHEMA, loader_of, schema_with, write_log
from triptych.datasets.loader import Tally
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import ReadingPosition
from triptych.datasets.schema import InputError

POSITION = ReadingPosition(2, 8)
ORDER = {"seed": 3, "shuffle": True, "window": 2}
CHANGED = "the training files changed since this checkpoint; restore them or start another run"


def loader_in(folder, schema=None, **changes):
    """A loader of all files below a folder."""
    schema = schema or schema_with(root=str(folder))
    paths = sorted(map(str, folder.rglob("*.parquet")))
    return loader_of(list_slices(schema, paths, labels=True).slices, schema=schema, **(ORDER | changes))


def refusal(loader, state):
    with pytest.raises(InputError) as refused:
        loader.load_state_dict(state)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def log(tmp_path):
    """Two files of one name with equal row counts, in two folders."""
    for seed, folder in enumerate(("day=1", "day=2")):
        (tmp_path / "log" / folder).mkdir(parents=True)
        write_log(tmp_path / "log" / folder, [(20, 5)], seed=seed)
    return tmp_path / "log"


class TestState:
    def test_it_reads_back_from_json_on_any_number_of_ranks_wherever_the_files_are(self, log, tmp_path):
        state = json.loads(json.dumps(loader_in(log).state_dict(POSITION)))
        assert loader_in(log, rank=2, world_size=3).load_state_dict(state) == POSITION
        shutil.move(log, tmp_path / "moved")
        assert loader_in(tmp_path / "moved").load_state_dict(state) == POSITION

    def test_a_file_rewritten_with_as_many_rows_is_refused(self, log):
        path = log / "day=1" / "part-0.parquet"
        table = pq.read_table(path)
        pq.write_table(table, path, 5)
        content, state = path.read_bytes(), loader_in(log).state_dict(POSITION)
        users = table.schema.get_field_index("user")
        pq.write_table(table.set_column(users, "user", pa.array(range(20))), path, 5)
        assert refusal(loader_in(log), state) == CHANGED
        path.write_bytes(content)
        assert loader_in(log).load_state_dict(state) == POSITION

    def test_two_files_of_one_name_that_changed_places_are_refused(self, log):
        state = loader_in(log).state_dict(POSITION)
        (log / "day=1").rename(log / "day=3")
        (log / "day=2").rename(log / "day=1")
        (log / "day=3").rename(log / "day=2")
        assert refusal(loader_in(log), state) == CHANGED

    def test_a_file_more_or_less_is_refused_even_between_epochs(self, log):
        state = loader_in(log).state_dict(ReadingPosition(1, 0))
        shutil.copy(log / "day=1" / "part-0.parquet", log / "part-1.parquet")
        assert refusal(loader_in(log), state) == CHANGED
        shutil.rmtree(log / "day=1")
        assert refusal(loader_in(log), state) == CHANGED

    @pytest.mark.parametrize(
        ("key", "then", "now", "changes"),
        [
            ("train.seed", 3, 4, {"seed": 4}),
            ("data.shuffle", True, False, {"shuffle": False}),
            ("data.shuffle_row_groups", 2, 3, {"window": 3}),
            ("data.memory_mb", 2048, 512, {"memory_mb": 512}),
        ],
    )
    def test_another_order_is_refused_within_an_epoch_alone(self, log, key, then, now, changes):
        data = {key: value for key, value in changes.items() if key == "memory_mb"}
        other = loader_in(log, schema_with(root=str(log), **data), **{key: value for key, value in changes.items() if key not in data})
        message = f"'{key}' differs from the recipe of this checkpoint ({then} then, {now} now); restore it or start another run"
        assert refusal(other, loader_in(log).state_dict(POSITION)) == message
        between = ReadingPosition(2, 0)
        assert other.load_state_dict(loader_in(log).state_dict(between)) == between


def bad_log(folder):
    """Three files: a wrong label in row group 1 of the first, a flipped bit in row group 0 of the second; the third is no parquet."""
    groups = write_log(folder, [(12, 4), (12, 4)])
    first, second = (part.file.path for part in (groups[0], groups[3]))
    table = pq.read_table(first)
    click = table.schema.get_field_index("click")
    pq.write_table(table.set_column(click, "click", pa.array([0] * 7 + [2] + [1] * 4, pa.int8())), first, 4)
    pq.write_table(pq.read_table(second), second, 4, write_page_checksum=True)
    chunk = pq.read_metadata(second).row_group(0).column(1)
    content = bytearray((folder / "part-1.parquet").read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1] ^= 1
    (folder / "part-1.parquet").write_bytes(content)
    (folder / "part-2.parquet").write_bytes(b"user,item")
    return [first, second, str(folder / "part-2.parquet")]


class TestTally:
    @pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 2)])
    def test_bad_row_groups_are_left_out_and_counted_once(self, tmp_path, workers, world_size):
        paths, schema = bad_log(tmp_path), schema_with(on_bad_file="skip", workers=workers)
        listing = list_slices(schema, paths, labels=True)
        tally, rows = Tally(dict(listing.bad_files)), []
        for rank in range(world_size):
            loader = loader_of(listing.slices, rank=rank, world_size=world_size, schema=schema, shuffle=True, window=2)
            for epoch in range(2):
                rows += [row for batch in loader.batches(ReadingPosition(epoch)) for row in batch.row_B.tolist() if row >= 0]
            tally.update(loader.tally)
        kept = [*range(4), *range(8, 12), *range(16, 24)]
        assert sorted(rows) == sorted(kept * 2)
        report = tally.report()["skipped"]
        assert (report["rows"], report["files"], tally.skipped_rows) == (8, 3, 8)
        assert report["reasons"][0].startswith(f"{paths[2]}: not a readable parquet file")
        assert sorted(reason.partition(" (")[0] for reason in report["reasons"][1:]) == [
            f"{paths[0]}: row group 1: label 'click' of task 'ctr' must be 0 or 1, but holds 2",
            f"{paths[1]}: row group 0 cannot be read",
        ]

    def test_rows_that_are_left_out_weigh_nothing(self, tmp_path):
        paths, schema = bad_log(tmp_path), schema_with(on_bad_file="skip")
        listing = list_slices(schema, paths, labels=True)
        batches = list(loader_of(listing.slices, schema=schema, batch_size=4).batches())
        assert [len(batch.row_B) for batch in batches] == [4] * 6
        for batch in (batches[1], batches[3]):
            assert batch.row_B.tolist() == [-1] * 4 and batch.weight_B.tolist() == [0] * 4
            assert not batch.known_BT.any() and batch.ids.lengths().sum() == 0

    def test_the_default_is_to_fail(self, tmp_path):
        paths = bad_log(tmp_path)
        with pytest.raises(InputError, match=r"part-2\.parquet: not a readable parquet file"):
            list_slices(SCHEMA, paths, labels=True)
        with pytest.raises(InputError, match=r"part-0\.parquet: row group 1: label 'click'"):
            list(loader_of(list_slices(SCHEMA, paths[:2], labels=True).slices).batches())

    def test_durations_are_counted_once_however_often_they_are_read(self, tmp_path):
        (group,) = write_log(tmp_path, [(6, 6)])
        table = pq.read_table(group.file.path)
        table = table.set_column(table.schema.get_field_index("dwell_ms"), "dwell_ms", pa.array([-5, -1, 0, 60_000, 60_001, 10**6]))
        table = table.set_column(table.schema.get_field_index("click"), "click", pa.array([1] * 6, pa.int8()))
        pq.write_table(table, group.file.path)
        loader = loader_of(list_slices(SCHEMA, [group.file.path], labels=True).slices)
        for epoch in range(3):
            labels = [label for batch in loader.batches(ReadingPosition(epoch)) for label in batch.labels_BT[:, 0].tolist()]
            assert labels == [0, 0, 0, 60, 60, 60]
        assert loader.tally.report()["capped"] == {"dwell": {"negative": 2, "above_cap": 2}}

    def test_it_reads_back_from_json(self):
        tally = Tally({"a": (3, "no file")}, {"b: row group 0": ("b", 7, "why")}, {"c: row group 1": {"dwell": (1, 2)}})
        again = Tally(**json.loads(json.dumps(asdict(tally))))
        assert again.report() == tally.report()
        again.update(tally)
        assert again.report() == {
            "skipped": {"rows": 10, "files": 2, "reasons": ["no file", "why"]},
            "capped": {"dwell": {"negative": 1, "above_cap": 2}},
        }
