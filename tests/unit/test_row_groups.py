"""The order of an epoch deals every row once, whatever the ranks, and depends on nothing but seed, epoch, files and window."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.datasets.row_groups import DataFile, EpochOrder, Slice, fingerprint

many_examples = settings(deadline=None, max_examples=80)
world_sizes = st.integers(1, 4)
batch_sizes = st.integers(1, 9)


def file_named(name, folder="logs", size=100, digest="d"):
    return DataFile(f"{folder}/{name}", name, size, digest)


def row_groups(sizes):
    """Row groups of these sizes, two a file; or where sizes are lists, of slices of these sizes."""
    parts, first_row = [], 0
    for i, size in enumerate(sizes):
        start = 0
        for rows in size if isinstance(size, list) else [size]:
            parts.append(Slice(file_named(f"part-{i // 2}.parquet"), i % 2, start, first_row + start, rows))
            start += rows
        first_row += start
    return parts


cut_sizes = st.lists(st.one_of(st.integers(0, 9), st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=8)


@st.composite
def orders(draw, shuffle=st.booleans()):
    return EpochOrder(
        row_groups(draw(cut_sizes)),
        seed=draw(st.integers(0, 2**40)),
        epoch=draw(st.integers(0, 5)),
        shuffle=draw(shuffle),
        window=draw(st.integers(1, 6)),
    )


@dataclass
class NaiveOrder:
    """An order with every row written out: rows by lane, and lanes and rows in the order of the epoch."""

    lanes: list[list[int]]
    turns: list[tuple[int, int]]

    @property
    def rows(self):
        return [row for _, row in self.turns]


def naive(order):
    lanes = []
    for groups in order.lanes:
        within = [order.rows_within(group) for group in groups]
        lanes.append(
            [
                group.first_row + int(i)
                for group, rows in zip(groups, within, strict=True)
                for i in (range(group.rows) if rows is None else rows)
            ]
        )
    turns = [(lane, row) for round_ in zip_longest(*lanes) for lane, row in enumerate(round_) if row is not None]
    return NaiveOrder(lanes, turns)


def rows_of_share(lanes, order, start, stop, rank, world_size):
    return [row for r in order.share(start, stop, rank, world_size) for row in lanes[r.lane][r.start : r.stop]]


def steps(order, global_batch_size):
    return [(start, start + global_batch_size) for start in range(0, order.num_rows, global_batch_size)]


class TestShares:
    @many_examples
    @given(orders(), world_sizes, batch_sizes)
    def test_all_ranks_over_all_steps_take_every_row_once(self, order, world_size, batch_size):
        lanes = naive(order).lanes
        rows = [
            row
            for start, stop in steps(order, batch_size * world_size)
            for rank in range(world_size)
            for row in rows_of_share(lanes, order, start, stop, rank, world_size)
        ]
        assert sorted(rows) == list(range(order.num_rows))

    @many_examples
    @given(orders(), world_sizes, batch_sizes)
    def test_ranks_differ_by_at_most_one_row_in_a_step(self, order, world_size, batch_size):
        for start, stop in steps(order, batch_size * world_size):
            counts = [sum(r.stop - r.start for r in order.share(start, stop, rank, world_size)) for rank in range(world_size)]
            assert max(counts) - min(counts) <= 1
            assert max(counts) == -(-(min(stop, order.num_rows) - start) // world_size)

    @many_examples
    @given(orders(), st.data())
    def test_a_global_batch_is_a_stretch_of_the_order_for_any_number_of_ranks(self, order, data):
        start = data.draw(st.integers(0, order.num_rows))
        stop = data.draw(st.integers(start, order.num_rows + 3))
        expected = naive(order)
        for world_size in range(1, 5):
            rows = [row for rank in range(world_size) for row in rows_of_share(expected.lanes, order, start, stop, rank, world_size)]
            assert sorted(rows) == sorted(expected.rows[start:stop])

    @many_examples
    @given(orders(), st.integers(0, 90))
    def test_taken_equals_a_round_robin_loop(self, order, num_rows):
        counts = [0] * len(order.lanes)
        for lane, _ in naive(order).turns[:num_rows]:
            counts[lane] += 1
        assert order.taken(num_rows).tolist() == counts


class TestLanes:
    @many_examples
    @given(orders(), world_sizes, batch_sizes)
    def test_ranks_share_at_most_the_lane_at_each_cut(self, order, world_size, batch_size):
        for start, stop in steps(order, batch_size * world_size):
            lanes = [[r.lane for r in order.share(start, stop, rank, world_size)] for rank in range(world_size)]
            in_rank_order = [lane for of_rank in lanes for lane in of_rank]
            assert in_rank_order == sorted(in_rank_order)
            assert len(in_rank_order) <= len(set(in_rank_order)) + world_size - 1

    @pytest.mark.parametrize(("window", "world_size"), [(4, 1), (4, 2), (4, 4), (6, 3), (8, 2)])
    def test_a_rank_reads_the_same_lanes_all_epoch_where_they_divide_evenly(self, window, world_size):
        order = EpochOrder(row_groups([10] * (3 * window)), seed=1, epoch=0, shuffle=True, window=window)
        each = window // world_size
        for start, stop in steps(order, 2 * window):
            for rank in range(world_size):
                assert [r.lane for r in order.share(start, stop, rank, world_size)] == list(range(rank * each, (rank + 1) * each))

    @many_examples
    @given(orders(shuffle=st.just(True)))
    def test_every_slice_with_rows_is_in_one_lane_and_lanes_are_even(self, order):
        lengths = [sum(part.rows for part in lane) for lane in order.lanes]
        parts = [part for lane in order.lanes for part in lane]
        assert order.lane_lengths.tolist() == lengths
        assert len(set(parts)) == len(parts) and all(part.rows for part in parts)
        groups = Counter()
        for part in parts:
            groups[part.file, part.row_group] += part.rows
        assert max(lengths) - min(lengths) <= max(groups.values(), default=0)

    @many_examples
    @given(orders())
    def test_slices_of_a_row_group_stay_together_and_in_order_in_one_lane(self, order):
        of_lanes = [[(part.file, part.row_group) for part in lane] for lane in order.lanes]
        seen = [group for lane in of_lanes for group, _ in groupby(lane)]
        assert len(set(seen)) == len(seen)
        for lane in order.lanes:
            for before, after in pairwise(lane):
                if (before.file, before.row_group) == (after.file, after.row_group):
                    assert after.start == before.start + before.rows and after.first_row == before.first_row + before.rows

    def test_cutting_row_groups_leaves_them_in_their_lanes(self):
        options = {"seed": 3, "epoch": 1, "shuffle": True, "window": 3}
        whole = EpochOrder(row_groups([9, 6, 7, 8]), **options)
        cut = EpochOrder(row_groups([[4, 5], 6, [1, 2, 4], [8]]), **options)
        assert [[(p.file, p.row_group) for p in lane] for lane in whole.lanes] == [
            [group for group, _ in groupby((p.file, p.row_group) for p in lane)] for lane in cut.lanes
        ]

    @given(st.integers(1, 12), st.integers(1, 12))
    def test_window_is_the_number_of_lanes_unless_there_are_fewer_row_groups(self, num_groups, window):
        order = EpochOrder(row_groups([3] * num_groups), seed=0, epoch=0, shuffle=True, window=window)
        assert len(order.lanes) == min(window, num_groups)


class TestOrder:
    GROUPS = row_groups([7] * 20)

    def rows(self, seed, epoch, window=4):
        return naive(EpochOrder(self.GROUPS, seed=seed, epoch=epoch, shuffle=True, window=window)).rows

    @many_examples
    @given(st.integers(0, 2**33), st.integers(0, 2**33), st.integers(0, 9), st.integers(0, 9))
    def test_it_is_a_function_of_seed_and_epoch(self, seed, other_seed, epoch, other_epoch):
        assert self.rows(seed, epoch) == self.rows(seed, epoch)
        assert (self.rows(seed, epoch) == self.rows(other_seed, epoch)) == (seed == other_seed)
        assert (self.rows(seed, epoch) == self.rows(seed, other_epoch)) == (epoch == other_epoch)

    def test_seed_and_epoch_are_not_interchangeable(self):
        assert self.rows(1, 2) != self.rows(2, 1)

    def test_row_groups_and_the_rows_of_each_are_permuted_every_epoch(self):
        first, second = (EpochOrder(self.GROUPS, seed=0, epoch=epoch, shuffle=True, window=4) for epoch in (0, 1))
        assert first.lanes != second.lanes
        permutations = [order.rows_within(group).tolist() for order in (first, second) for group in self.GROUPS]
        assert len({tuple(permutation) for permutation in permutations}) > 30  # of 5040, drawn 40 times

    @many_examples
    @given(orders(shuffle=st.just(False)))
    def test_without_shuffle_every_lane_is_in_file_order_and_one_lane_is_the_file_order(self, order):
        assert all(lane == sorted(lane) for lane in naive(order).lanes)
        if len(order.lanes) == 1:
            assert naive(order).rows == list(range(order.num_rows))

    def test_without_shuffle_two_ranks_read_row_groups_of_their_own(self):
        order = EpochOrder(self.GROUPS, seed=0, epoch=0, shuffle=False, window=2)
        assert [{r.lane for start, stop in steps(order, 8) for r in order.share(start, stop, rank, 2)} for rank in (0, 1)] == [{0}, {1}]

    def test_a_batch_draws_evenly_from_all_open_row_groups(self):
        rows = self.rows(seed=3, epoch=0, window=4)
        for start in range(0, len(rows), 28):
            assert sorted(np.unique([row // 7 for row in rows[start : start + 28]], return_counts=True)[1]) == [7, 7, 7, 7]


FILES = {"a.parquet": (100, "x"), "day/b.parquet": (90, "y"), "other/b.parquet": (90, "z")}


class TestFingerprint:
    def of(self, files, folder="logs", row_groups=2, slices=1):
        parts = [
            Slice(file_named(name, folder, size, digest), number, 10 * i, 0, 10)
            for name, (size, digest) in files.items()
            for number in range(row_groups)
            for i in range(slices)
        ]
        return fingerprint(parts)

    def test_it_stays_when_the_folder_moves_and_when_memory_cuts_row_groups(self):
        assert self.of(FILES) == self.of(FILES, folder="/elsewhere/logs") == self.of(FILES, slices=3)

    @pytest.mark.parametrize(
        "files",
        [
            pytest.param({**FILES, "d.parquet": (1, "")}, id="added"),
            pytest.param({name: file for name, file in FILES.items() if name != "a.parquet"}, id="removed"),
            pytest.param({"z.parquet" if name == "a.parquet" else name: file for name, file in FILES.items()}, id="renamed"),
            pytest.param({**FILES, "a.parquet": (100, "X")}, id="another footer"),
            pytest.param({**FILES, "a.parquet": (101, "x")}, id="another size"),
            pytest.param(dict(reversed(FILES.items())), id="in another order"),
            pytest.param({**FILES, "day/b.parquet": (90, "z"), "other/b.parquet": (90, "y")}, id="swapped between folders"),
            pytest.param({name.replace("other", "more"): file for name, file in FILES.items()}, id="in another folder"),
        ],
    )
    def test_it_changes_when_files_change(self, files):
        assert self.of(files) != self.of(FILES)
