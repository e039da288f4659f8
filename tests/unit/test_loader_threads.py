"""Threads that read ahead: the same batches for any number of them, no thread left behind, and no more read than is asked for."""

import gc
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_loader import SCHEMA, cut, loader_of, logs, orders, rows_of, schema_with, write_log
from triptych.datasets.loader import in_background
from triptych.datasets.parquet.decode import Decoder
from triptych.datasets.parquet.listing import list_slices
from triptych.datasets.row_groups import EpochOrder
from triptych.datasets.schema import InputError


def recording(note):
    """A decoder that calls `note` with the name of every slice that it decodes."""

    class Recording(Decoder):
        def decode(self, table, where, first_row):
            note(where)
            return super().decode(table, where, first_row)

    return Recording


def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "decoder")))


class TestWorkers:
    @settings(deadline=None, max_examples=12)
    @given(logs, st.integers(1, 3), orders, st.integers(1, 5))
    def test_any_number_gives_the_same_batches(self, tmp_path_factory, files, world_size, order, slice_rows):
        slices = cut(write_log(tmp_path_factory.mktemp("log"), files), slice_rows)
        for rank in range(world_size):
            batches = [
                [rows_of(batch) for batch in loader_of(slices, rank=rank, world_size=world_size, schema=schema, **order).batches()]
                for schema in (schema_with(workers=workers) for workers in range(4))
            ]
            assert batches == batches[:1] * 4

    def test_more_slices_than_a_rank_needs_of_a_shared_lane(self, tmp_path):
        """Rank 1 of 3 reads the middle of every batch's stretch of one lane, and skips whole slices between."""
        slices = cut(write_log(tmp_path, [(300, 300)]), 3)
        order = {"rank": 1, "world_size": 3, "batch_size": 20}
        inline, threaded = (loader_of(slices, schema=schema_with(workers=workers), **order) for workers in (0, 2))
        assert [rows_of(batch) for batch in threaded.batches()] == [rows_of(batch) for batch in inline.batches()]


class TestReading:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_each_rank_decodes_the_row_groups_of_its_lanes_once(self, tmp_path, world_size, workers):
        groups = write_log(tmp_path, [(24, 3), (12, 3)])
        order = {"seed": 5, "shuffle": True, "window": 4}
        lanes = EpochOrder(groups, epoch=0, **order).lanes
        for rank in range(world_size):
            decoded, ranks = [], {"rank": rank, "world_size": world_size}
            schema = schema_with(workers=workers)
            list(loader_of(groups, schema=schema, decoder=recording(decoded.append), batch_size=4, **ranks, **order).batches())
            own = lanes[rank * 4 // world_size : (rank + 1) * 4 // world_size]
            assert sorted(decoded) == sorted(str(group) for lane in own for group in lane)

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_a_bad_row_ends_reading_after_the_batches_before_it(self, tmp_path, workers):
        groups = write_log(tmp_path, [(8, 2), (8, 2)])
        table = pq.read_table(groups[4].file.path)
        pq.write_table(table.set_column(8, "click", pa.array([0] * 4 + [2] * 4)), tmp_path / "bad.parquet", 2)
        groups = list_slices(SCHEMA, [groups[0].file.path, str(tmp_path / "bad.parquet")], labels=True).slices
        batches = loader_of(groups, schema=schema_with(workers=workers), batch_size=2).batches()
        assert [next(batches).row_B.tolist() for _ in range(6)] == [[row, row + 1] for row in range(0, 12, 2)]
        with pytest.raises(InputError, match=r"bad\.parquet: row group 2: label 'click' .* holds 2"):
            next(batches)
        assert threads() == []

    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_threads_end_when_batches_are_exhausted_closed_or_forgotten(self, tmp_path, workers):
        loader = loader_of(write_log(tmp_path, [(40, 4)]), schema=schema_with(workers=workers), window=4, batch_size=2)
        exhausted, closed, forgotten = (loader.batches() for _ in range(3))
        assert threads() == []

        def each_has_threads(number):
            """So many readers, with at least one decoder each; an executor starts further ones only when none is idle."""
            decoders = len(threads()) - threads().count("reader")
            return threads().count("reader") == number and number <= decoders <= number * workers

        next(exhausted), next(closed), next(forgotten)
        assert each_has_threads(3)
        assert len(list(exhausted)) == 19
        assert each_has_threads(2)
        closed.close()
        assert each_has_threads(1)
        del forgotten
        gc.collect()
        assert threads() == []

    def test_without_workers_there_are_no_threads(self, tmp_path):
        batches = loader_of(write_log(tmp_path, [(8, 4)])).batches()
        next(batches)
        assert threads() == []


class Ahead:
    """Counts what the thread has begun beyond what its consumer has asked for."""

    def __init__(self):
        self.begun = self.asked = self.most = 0
        self.changed = threading.Condition()

    def begin(self):
        with self.changed:
            self.begun += 1
            self.most = max(self.most, self.begun - self.asked)
            self.changed.notify()

    def consume(self, items, depth):
        """Take one item, wait for the thread to be `depth` ahead of it and go no further, then take the rest."""
        with self.changed:
            self.asked = 1
        next(items)
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun == 1 + depth, timeout=60)
            assert not self.changed.wait_for(lambda: self.begun > 1 + depth, timeout=0.2)
            self.asked = 2
        for _ in items:
            with self.changed:
                self.asked += 1


class TestReadingAhead:
    @pytest.mark.parametrize("depth", [1, 2, 5])
    def test_at_most_depth_items_are_computed_ahead(self, depth):
        ahead = Ahead()

        def items():
            for item in range(200):
                ahead.begin()
                yield item

        ahead.consume(in_background(items, depth), depth)
        assert ahead.most == depth

    @pytest.mark.parametrize("workers", [1, 3])
    def test_prefetch_is_the_depth_in_batches_and_one_more_slice_is_decoded(self, tmp_path, workers):
        groups, ahead = write_log(tmp_path, [(40, 1)]), Ahead()
        schema = schema_with(workers=workers)
        loader = loader_of(groups, schema=schema, batch_size=1, decoder=recording(lambda where: ahead.begin()))
        ahead.consume(loader.batches(), schema.data.prefetch + 1)
        assert ahead.most == schema.data.prefetch + 1

    def test_without_workers_nothing_is_decoded_before_it_is_needed(self, tmp_path):
        decoded = []
        batches = loader_of(write_log(tmp_path, [(8, 1)]), batch_size=1, decoder=recording(decoded.append)).batches()
        for number in range(1, 9):
            next(batches)
            assert len(decoded) == number

    def test_items_come_in_order_and_an_exception_after_them(self):
        def items():
            yield from range(9)
            raise KeyError("from the thread")

        received = in_background(items, 3)
        assert [next(received) for _ in range(9)] == list(range(9))
        with pytest.raises(KeyError, match="from the thread"):
            next(received)
