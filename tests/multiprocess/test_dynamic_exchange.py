"""Dynamic ids over ranks: which rank saw an id, and how many ranks there are, makes no difference to its row."""

import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks
from triptych.embeddings.dynamic.exchange import DynamicIds
from triptych.embeddings.dynamic.slot_map import Counters

STEPS = 14


class Table(NamedTuple):
    name: str
    rows: int
    eviction: str = "lfu"
    min_count: int = 1


TABLES = [Table("user", 500, "distance_lfu"), Table("item", 260, "lfu", 3), Table("word", 1000, "lru", 2), Table("tiny", 6, "lru")]


def batches(step):
    """The ids of a global batch, for each table: some come back, some tables get none, and there are more of them than rows."""
    generator = np.random.default_rng(step)
    sizes = {"user": 700, "item": 2000 * (step % 5 != 3), "word": 1500, "tiny": 3}
    top = {"user": 900, "item": 1500, "word": 1300, "tiny": 12}
    return {
        name: torch.from_numpy((top[name] * generator.random(size) ** 2).astype(np.int64) * (-1) ** step - step // 4)
        for name, size in sizes.items()
    }


def share(codes, rank, world_size, step):
    """A rank's part of the global batch; in some steps a rank has none. Parts have different sizes."""
    cuts = {
        name: [len(ids) * (r * r if step % 3 else r) // (world_size**2 if step % 3 else world_size) for r in range(world_size + 1)]
        for name, ids in codes.items()
    }
    if step % 4 == 0:
        cuts = {name: [0] + [len(ids)] * world_size for name, ids in codes.items()}
    return {name: ids[cuts[name][rank] : cuts[name][rank + 1]] for name, ids in codes.items()}


def run_steps(ids, rank, world_size, first, last):
    """What each step gives: this rank's rows, then what all ranks know, then what the next step's ids would find."""
    results = []
    for step in range(first, last):
        learned = ids.learn(share(batches(step), rank, world_size, step))
        found = ids.find(share(batches(step + 1), rank, world_size, step + 1))
        results.append((learned.rows, learned.fresh_A3, learned.counters_TC, found))
    return results


def on_ranks(ranks, saved, first, last):
    """Steps on a thread of their own with a group of their own, beside other collectives; then the state."""
    group = dist.new_group(backend="gloo")
    ids = DynamicIds(TABLES, ranks.rank, ranks.world_size, group)
    if saved is not None:
        load(ids, saved)
    results = []
    thread = threading.Thread(target=lambda: results.extend(run_steps(ids, ranks.rank, ranks.world_size, first, last)))
    thread.start()
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    thread.join()
    return results, {name: as_part(value) for name, value in ids.state().items()}


def as_part(value):
    """(tensor, where it begins, length of the whole): of what every rank has whole, too."""
    return (value, 0, len(value)) if isinstance(value, torch.Tensor) else tuple(value)


def load(ids, saved):
    """Fill each array from the parts of it that ranks saved."""
    for name, value in ids.state().items():
        tensor, first, total = as_part(value)
        whole = torch.zeros(total, dtype=tensor.dtype)
        for part, part_first, part_total in (state[name] for state in saved):
            assert part_total == total
            whole[part_first : part_first + len(part)] = part
        tensor.copy_(whole[first : first + len(tensor)])
    ids.loaded()


def joined(rows_of_ranks):
    return {name: torch.cat([rows[name] for rows in rows_of_ranks]) for name in rows_of_ranks[0]}


def assert_equal_steps(of_ranks, of_one):
    assert all(len(results) == len(of_one) for results in of_ranks)
    for step, expected in enumerate(of_one):
        rows, fresh, counters, found = zip(*(results[step] for results in of_ranks), strict=True)
        for name in expected[0]:
            assert torch.equal(joined(rows)[name], expected[0][name]) and torch.equal(joined(found)[name], expected[3][name])
        assert all(torch.equal(f, expected[1]) for f in fresh) and all(torch.equal(c, expected[2]) for c in counters)


@pytest.fixture(scope="module")
def one_rank():
    return run_steps(DynamicIds(TABLES), 0, 1, 1, STEPS)


def test_the_steps_are_worth_comparing(one_rank):
    """Each table admits and evicts, some turn ids away, and what all ranks are told agrees with the rows."""
    counters = {field: sum(r[2] for r in one_rank)[:, i] for i, field in enumerate(Counters._fields)}
    assert all((counters[field] > 0).all() for field in ("hits", "admitted", "evicted"))
    assert all((counters[field] > 0).any() for field in ("shared", "refused"))
    for rows, fresh_A3, counters_TC, _ in one_rank:
        order = fresh_A3[:, 0] * 10**6 + fresh_A3[:, 1]
        assert (order.diff() > 0).all() and len(fresh_A3) == counters_TC[:, Counters._fields.index("admitted")].sum()
        assert [len(rows[table.name]) for table in TABLES] == counters_TC[:, 0].tolist()
    ids = DynamicIds(TABLES)
    for step in range(1, STEPS):
        codes = batches(step)
        learned = ids.learn(codes)
        for table, row, code in learned.fresh_A3.tolist():
            name = TABLES[table].name
            assert (learned.rows[name][codes[name] == code] == row).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_rank_and_go_on_from_what_other_numbers_of_ranks_saved(world_size, one_rank):
    middle = STEPS // 2
    first = run_on_ranks(world_size, on_ranks, None, 1, middle)
    assert_equal_steps([results for results, _ in first], one_rank[: middle - 1])
    saved = [state for _, state in first]
    second = run_on_ranks(5 - world_size, on_ranks, saved, middle, STEPS)
    assert_equal_steps([results for results, _ in second], one_rank[middle - 1 :])
    alone = DynamicIds(TABLES)
    load(alone, saved)
    assert_equal_steps([run_steps(alone, 0, 1, middle, STEPS)], one_rank[middle - 1 :])
