"""A row's number in the split -> file, row group and row in it, however row groups are cut into slices."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import rows, write_log
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import DataFile, Slice, place_of_row
from triptych.launch.config import load_recipe


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=3))
def test_every_row_of_every_cut_is_found(files):
    """`files`: of each file, of each row group, the rows of its slices."""
    slices, expected = [], []
    for f, groups in enumerate(files):
        for g, parts in enumerate(groups):
            start = 0
            for count in parts:
                slices.append(Slice(DataFile(f"/log/{f}.parquet", f"{f}.parquet", 1, ""), g, start, len(expected), count))
                expected += [f"/log/{f}.parquet: row group {g}, row {start + i}" for i in range(count)]
                start += count
    assert [place_of_row(slices, row) for row in range(len(expected))] == expected


def test_the_place_holds_the_row_where_a_row_group_is_cut(tmp_path):
    recipe = load_recipe(write_log(tmp_path), ["data.memory_mb=1", "data.shuffle_row_groups=1"])
    for name, count, seed in (("a", 5000, 3), ("b", 60_000, 4)):
        pq.write_table(pa.table(rows(count, seed)), tmp_path / f"{name}.parquet", row_group_size=30_000)
    slices = list_slices(recipe.data_schema, [str(tmp_path / f"{name}.parquet") for name in "ab"], labels=True).slices
    assert any(part.start for part in slices)
    users = [pq.ParquetFile(tmp_path / f"{name}.parquet") for name in "ab"]
    for row in [0, 4999, 5000, *np.random.default_rng(0).integers(0, 65_000, 50).tolist(), 64_999]:
        path, _, place = place_of_row(slices, row).partition(": row group ")
        group, _, within = place.partition(", row ")
        file = users[path.endswith("b.parquet")]
        # time_ms counts the rows of a file.
        found = file.read_row_group(int(group), columns=["time_ms"])["time_ms"][int(within)].as_py()
        assert found == (row if row < 5000 else row - 5000)
