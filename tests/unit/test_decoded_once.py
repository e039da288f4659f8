"""A rank decodes a slice once, also where lanes do not divide the batch and a boundary lane comes and goes."""

from collections import Counter

import pytest

from tests.small import write_log
from tests.unit.test_loader_threads import recording
from triptych.datasets.fitted import Fitted
from triptych.datasets.loader import Loader
from triptych.datasets.parquet.listing import list_slices
from triptych.launch.config import load_recipe


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "window", "batch_size"), [(2, 3, 7), (2, 5, 16), (3, 4, 10), (4, 6, 11), (1, 3, 20)])
def test_every_rank_decodes_a_slice_at_most_once(world_size, window, batch_size, workers, tmp_path):
    schema = load_recipe(write_log(tmp_path, train_rows=600, row_group_rows=40), [f"data.workers={workers}"]).data_schema
    slices = list_slices(schema, [str(tmp_path / "train.parquet")], labels=True).slices
    order = {"world_size": world_size, "shuffle": True, "window": window, "batch_size": batch_size}
    decoded_by_anyone, num_rows = set(), 0
    for rank in range(world_size):
        decoded = []
        loader = Loader(recording(decoded.append)(schema, Fitted()), slices, rank=rank, **order)
        num_rows += sum(int((batch.row_B >= 0).sum()) for batch in loader.batches())
        assert set(Counter(decoded).values()) == {1}
        decoded_by_anyone |= set(decoded)
    assert num_rows == 600 and decoded_by_anyone == {str(part) for part in slices}
