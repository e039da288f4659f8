"""A rank decodes a row group once, also where lanes do not divide the batch and a boundary lane comes and goes."""

from collections import Counter

import pytest

from tests.small import write_log
from triptych.datasets.files import list_row_groups
from triptych.datasets.loader import Loader
from triptych.launch.config import load_recipe


@pytest.mark.parametrize(("world_size", "window", "batch_size"), [(2, 3, 7), (2, 5, 16), (3, 4, 10), (4, 6, 11), (1, 3, 20)])
def test_every_rank_decodes_a_row_group_at_most_once(world_size, window, batch_size, tmp_path):
    schema = load_recipe(write_log(tmp_path, train_rows=600, row_group_rows=40)).data_schema
    groups = list_row_groups([str(tmp_path / "train.parquet")])
    read_by_anyone = set()
    for rank in range(world_size):
        loader = Loader(schema, groups, rank=rank, world_size=world_size, shuffle=True, window=window, batch_size=batch_size)
        decoded = Counter()
        decode = loader._decode

        def counted(group, decoded=decoded, decode=decode):
            decoded[group] += 1
            return decode(group)

        loader._decode = counted
        assert sum(int((batch.row_B >= 0).sum()) for batch in loader.batches()) > 0
        assert set(decoded.values()) == {1}, decoded
        read_by_anyone |= set(decoded)
    assert read_by_anyone == set(groups)
