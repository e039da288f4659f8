"""Slots of dynamic ids against a slow plain reference; ranges of sets; what is remembered, loaded by any number of ranks."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.embeddings.dynamic.slot_map import SlotMap
from triptych.embeddings.dynamic.slots import SCORES, Geometry

MASK = 2**64 - 1
POLICIES = sorted(SCORES)
RANKING = {
    "lfu": lambda count, last, step: (count, last),
    "lru": lambda count, last, step: (last, count),
    "distance_lfu": lambda count, last, step: Fraction(count, step - last + 1),
}


def mixed(code):
    """SplitMix64 (Steele et al., OOPSLA 2014), one id at a time."""
    value = (code + 0x9E3779B97F4A7C15) & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


class PlainSet:
    """One set, way by way."""

    def __init__(self, ways, ranking):
        self.ways, self.ranking = [None] * ways, ranking

    def way(self, code):
        return next((way for way, held in enumerate(self.ways) if held and held["code"] == code), None)

    def seen(self, way, count, step):
        held = self.ways[way]
        held["count"], held["last"] = min(held["count"] + count, 2**31 - 1), step
        return held["count"]

    def place(self, counts, step):
        """The way each id gets, and how many ids lost theirs."""
        got, evicted = {}, 0
        for code in sorted(counts, key=lambda code: (-counts[code], code)):
            ways = [way for way, held in enumerate(self.ways) if held is None][:1]
            if not ways:
                old = [way for way, held in enumerate(self.ways) if held["last"] != step]
                ways = sorted(old, key=lambda way: self.ranking(self.ways[way]["count"], self.ways[way]["last"], step))[:1]
                evicted += len(ways)
            for way in ways:
                self.ways[way], got[code] = {"code": code, "count": min(counts[code], 2**31 - 1), "last": step}, way
        return got, evicted


class PlainMap:
    """A table, id by id."""

    def __init__(self, rows, eviction, min_count):
        self.num_sets = max(1, (rows - 1) // 64)
        self.num_ways = (rows - 1) // self.num_sets
        self.min_count = min_count
        self.sets = [PlainSet(self.num_ways, RANKING[eviction]) for _ in range(self.num_sets)]
        self.waiting = [PlainSet(self.num_ways, RANKING["lfu"]) for _ in range(self.num_sets)]

    def row(self, code):
        number = mixed(code) % self.num_sets
        way = self.sets[number].way(code)
        return 0 if way is None else 1 + number * self.num_ways + way

    def observe(self, counts, step):
        """What `Counters` holds, and {row: id} of those admitted."""
        hits = sum(count for code, count in counts.items() if self.row(code))
        admitted, evicted, refused = {}, 0, 0
        for number, (held, waiting) in enumerate(zip(self.sets, self.waiting, strict=True)):
            mine = {code: count for code, count in counts.items() if mixed(code) % self.num_sets == number}
            new = {code: count for code, count in mine.items() if held.way(code) is None}
            for code in mine.keys() - new.keys():
                held.seen(held.way(code), mine[code], step)
            waits = {code: waiting.way(code) for code in new if waiting.way(code) is not None}
            sums = new | {code: waiting.seen(way, new[code], step) for code, way in waits.items()}
            got, lost = held.place({code: count for code, count in sums.items() if count >= self.min_count}, step)
            for code in got.keys() & waits.keys():
                waiting.ways[waits[code]] = None
            if self.min_count > 1:
                waiting.place({code: count for code, count in new.items() if code not in got and code not in waits}, step)
            admitted |= {1 + number * self.num_ways + way: code for code, way in got.items()}
            evicted += lost
            refused += sum(count >= self.min_count for count in sums.values()) - len(got)
        shared = sum(count for code, count in counts.items() if not self.row(code))
        taken = sum(way is not None for held in self.sets for way in held.ways)
        return (sum(counts.values()), hits, shared, len(admitted), evicted, refused, taken), admitted


def counted(ids):
    return np.unique(np.asarray(ids, np.int64), return_counts=True)


@st.composite
def streams(draw):
    """Rows of a table, its min_count, and steps of ids, some of which come back, and more of them than there are rows."""
    rows = draw(st.integers(2, 12) | st.integers(60, 330))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = generator.integers(-(2**63), 2**63 - 1, max(4, int(rows * draw(st.sampled_from([0.8, 1.5, 4])))))
    pool[:3] = 0, -(2**63), 2**63 - 1
    sizes = draw(st.lists(st.integers(0, 2 * rows), min_size=1, max_size=7))
    return rows, draw(st.sampled_from([1, 1, 2, 3, 7])), [pool[(len(pool) * generator.random(size) ** 2).astype(int)] for size in sizes]


class TestAgainstAPlainMap:
    @settings(max_examples=150, deadline=None)
    @given(streams(), st.sampled_from(POLICIES))
    def test_rows_and_counters_are_equal(self, stream, eviction):
        rows, min_count, steps = stream
        slot_map, plain = SlotMap(rows, eviction, min_count), PlainMap(rows, eviction, min_count)
        for step, ids in enumerate(steps, start=1):
            code_U, count_U = counted(ids)
            observed = slot_map.observe(code_U, count_U, step)
            counters, admitted = plain.observe(dict(zip(code_U.tolist(), count_U.tolist(), strict=True)), step)
            assert tuple(observed.counters) == counters
            assert list(zip(observed.admitted_row_A, observed.admitted_code_A, strict=True)) == sorted(admitted.items())
            assert observed.row_U.tolist() == [plain.row(code) for code in code_U.tolist()]
        everyone = np.unique(np.concatenate([*steps, np.arange(5)]))
        assert slot_map.find(everyone).tolist() == [plain.row(code) for code in everyone.tolist()]

    def test_more_sets_than_are_worked_on_at_a_time(self):
        rows, generator = 64 * 1200 + 1, np.random.default_rng(5)
        slot_map, plain = SlotMap(rows, "lru"), PlainMap(rows, "lru", 1)
        for step in range(1, 4):
            code_U, count_U = counted(generator.integers(0, 4000, 5000))
            observed = slot_map.observe(code_U, count_U, step)
            plain.observe(dict(zip(code_U.tolist(), count_U.tolist(), strict=True)), step)
            assert observed.row_U.tolist() == [plain.row(code) for code in code_U.tolist()]


class TestRows:
    @settings(max_examples=60, deadline=None)
    @given(streams(), st.sampled_from(POLICIES))
    def test_no_two_ids_share_one_and_an_id_of_the_step_keeps_its_own(self, stream, eviction):
        rows, min_count, steps = stream
        slot_map, seen = SlotMap(rows, eviction, min_count), Counter()
        for step, ids in enumerate(steps, start=1):
            code_U, count_U = counted(ids)
            seen.update(ids.tolist())
            before_U = slot_map.find(code_U)
            observed = slot_map.observe(code_U, count_U, step)
            row_U = observed.row_U
            assert (row_U[before_U > 0] == before_U[before_U > 0]).all()
            assert row_U.min(initial=0) >= 0 and row_U.max(initial=0) < rows
            everyone = slot_map.find(np.unique(np.concatenate(steps)))
            assert max(Counter(everyone[everyone > 0].tolist()).values(), default=1) == 1
            assert (everyone > 0).sum() == observed.counters.taken
            assert all(seen[code] >= min_count for code in observed.admitted_code_A.tolist())

    @pytest.mark.parametrize("min_count", [1, 2, 3, 9])
    def test_an_id_gets_one_at_its_min_count_th_occurrence_if_there_is_room(self, min_count):
        slot_map, ids = SlotMap(200, "lfu", min_count), np.arange(-5, 5)
        for step in range(1, 12):
            observed = slot_map.observe(*counted(ids), step)
            assert (observed.row_U > 0).all() == (step >= min_count) and observed.counters.admitted == 10 * (step == min_count)

    def test_an_id_that_lost_its_own_is_counted_anew(self):
        slot_map, rows = SlotMap(4, "lru", 2), []
        for step, ids in enumerate([[1], [1], [2, 2, 3, 3, 4, 4], [1], [1]], start=1):
            slot_map.observe(*counted(ids), step)
            rows.append(bool(slot_map.find(np.array([1]))[0]))
        assert rows == [False, True, False, False, True]

    @settings(max_examples=30, deadline=None)
    @given(streams(), st.sampled_from(POLICIES))
    def test_finding_changes_nothing(self, stream, eviction):
        rows, min_count, steps = stream
        slot_map = SlotMap(rows, eviction, min_count)
        for step, ids in enumerate(steps, start=1):
            slot_map.observe(*counted(ids), step)
        before = {name: shard.tensor.clone() for name, shard in slot_map.state().items()}
        rows_of = slot_map.find(np.unique(np.concatenate(steps) + 1))
        assert all((shard.tensor == before[name]).all() for name, shard in slot_map.state().items())
        assert (slot_map.find(np.unique(np.concatenate(steps) + 1)) == rows_of).all()

    def test_counts_stop_at_the_largest(self):
        slot_map, code_U = SlotMap(5), np.array([7, 8])
        for step in range(1, 4):
            slot_map.observe(code_U, np.array([2**31 - 2, 2**40]), step)
        assert sorted(slot_map.slots.count_SW.reshape(-1).tolist()) == [0, 0, 2**31 - 1, 2**31 - 1]

    @pytest.mark.parametrize("rows", [0, 1])
    def test_a_table_of_the_shared_row_alone_is_refused(self, rows):
        with pytest.raises(ValueError, match="at least 2 rows"):
            SlotMap(rows)


class TestPolicies:
    @pytest.mark.parametrize("eviction", POLICIES)
    def test_scores_are_ordered_as_they_are_defined(self, eviction):
        step, generator = 2**31 - 1, np.random.default_rng(3)
        count = np.concatenate([generator.integers(1, high, 60) for high in (4, 2**31)]).astype(np.int32)
        last = np.concatenate([generator.integers(1, high, 60)[::-1] for high in (4, step)]).astype(np.int32)
        score = SCORES[eviction](count, last, step)
        assert score.dtype == np.int64 and score.min() >= 0
        exact = [RANKING[eviction](c, s, step) for c, s in zip(count.tolist(), last.tolist(), strict=True)]
        for a in range(len(score)):
            for b in range(a):  # what a float cannot tell apart may tie, but is never turned around
                may_tie = eviction == "distance_lfu" and score[a] == score[b]
                assert may_tie or (exact[a] > exact[b], exact[a] < exact[b]) == (score[a] > score[b], score[a] < score[b])

    def test_what_each_evicts(self):
        """id 1: often, long ago. id 2: twice, not long ago. id 3: once, just now."""
        evicted = {}
        for eviction in POLICIES:
            slot_map = SlotMap(4, eviction)
            for step, ids in [(1, [1] * 9), (18, [2, 2]), (19, [3]), (20, [4])]:
                slot_map.observe(*counted(ids), step)
            evicted[eviction] = [code for code in (1, 2, 3) if slot_map.find(np.array([code]))[0] == 0]
        assert evicted == {"lfu": [3], "lru": [1], "distance_lfu": [1]}


class TestRanges:
    @settings(max_examples=40, deadline=None)
    @given(streams(), st.sampled_from(POLICIES), st.integers(1, 6), st.integers(1, 6))
    def test_of_any_number_of_ranks_are_the_one_map_and_load_each_others_state(self, stream, eviction, world, new_world):
        rows, min_count, steps = stream
        one, maps = SlotMap(rows, eviction, min_count), ranks(world, rows, eviction, min_count)
        for step, ids in enumerate(steps, start=1):
            if step == len(steps) // 2 + 1:  # on another number of ranks from here
                new = ranks(new_world, rows, eviction, min_count)
                copy_state(maps, new)
                maps = new
            code_U, count_U = counted(ids)
            whole, parts = one.observe(code_U, count_U, step), []
            for slot_map in maps:
                set_U = one.geometry.sets(code_U)
                own_U = (set_U >= slot_map.first_set) & (set_U < slot_map.last_set)
                parts.append(slot_map.observe(code_U[own_U], count_U[own_U], step))
                assert (parts[-1].row_U == whole.row_U[own_U]).all()
            assert tuple(np.sum([part.counters for part in parts], axis=0)) == tuple(whole.counters)
            assert np.concatenate([part.admitted_row_A for part in parts]).tolist() == whole.admitted_row_A.tolist()
            assert np.concatenate([part.admitted_code_A for part in parts]).tolist() == whole.admitted_code_A.tolist()

    @given(st.integers(2, 10**12), st.integers(1, 500))
    def test_cover_each_set_once_and_leave_few_rows_over(self, rows, world):
        geometry = Geometry.of(rows)
        bounds = [geometry.first_set(rank, world) for rank in range(world + 1)]
        assert bounds[0] == 0 and bounds[-1] == geometry.num_sets and bounds == sorted(bounds)
        assert 0 <= rows - 1 - geometry.num_sets * geometry.ways < geometry.num_sets
        assert 64 <= geometry.ways <= 127 or rows < 65
        assert rows - 1 - geometry.num_sets * geometry.ways < 64

    def test_state_shares_memory(self):
        slot_map = SlotMap(300, "lfu", 2)
        for shard in slot_map.state().values():
            assert shard.tensor.shape == (shard.total,) and shard.first == 0
            shard.tensor.fill_(1)
        slot_map.loaded()
        assert slot_map.slots.id_SW.all() and slot_map.waiting.last_SW.all() and slot_map.slots.num_taken == slot_map.slots.id_SW.size


def ranks(world, rows, eviction, min_count):
    return [SlotMap(rows, eviction, min_count, rank, world) for rank in range(world)]


def copy_state(old, new):
    """What loading a checkpoint does: each new part is filled from the old parts it overlaps."""
    for target in new:
        for name, (tensor, first, total) in target.state().items():
            tensor.fill_(-1)
            for source in old:
                part = source.state()[name]
                assert part.total == total
                low, high = max(first, part.first), min(first + len(tensor), part.first + len(part.tensor))
                if low < high:
                    tensor[low - first : high - first] = part.tensor[low - part.first : high - part.first]
        target.loaded()
