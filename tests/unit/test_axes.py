"""What weights' places stand for: it covers every weight, and weights that go to their places compute the same in another model."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drawn import sections
from tests.random_recipes import random_recipe
from triptych.datasets.schema import SIDES
from triptych.embeddings.sharding import of_table
from triptych.launch.build import train_task
from triptych.launch.checkpoints.carried_dense import dense_tensors
from triptych.launch.config import Recipe
from triptych.mmoe.axes import Axes, Axis, Block, carry, origins, width
from triptych.mmoe.gates import QUIET, Gates
from triptych.mmoe.model import ModelSection, Tower

some_examples = settings(deadline=None, max_examples=60)


@given(st.integers(0, 10**6), sections)
@some_examples
def test_every_dense_weight_has_names_for_all_of_its_places(seed: int, section: ModelSection) -> None:
    recipe = random_recipe(seed).model_copy(update={"model": section})
    axes = train_task(recipe).model.axes()
    weights = {name: weight for name, weight in train_task(recipe).model.named_parameters() if of_table(name) is None}
    assert axes.keys() == weights.keys()
    for name, weight in weights.items():
        assert [width(axis) for axis in axes[name]] == list(weight.shape), name
        assert all(len(set(axis)) == len(axis) for axis in axes[name]), name
    state = {f"model/{name}" for name in train_task(recipe).state_dict() if of_table(name) is None}
    assert {tensor.name for tensor in dense_tensors(recipe).values()} == state


def test_naming_draws_no_random_numbers() -> None:
    recipe = random_recipe(0)
    before = torch.get_rng_state()
    dense_tensors(recipe)
    assert torch.equal(torch.get_rng_state(), before)


blocks = st.builds(Block, st.sampled_from(["feature", "task", "unit"]), st.sampled_from("abcd"), st.integers(1, 3))
axis_pairs = st.tuples(*[st.lists(blocks, min_size=1, max_size=4, unique_by=lambda b: b[:2]).map(tuple)] * 2)


def places(axis: Axis) -> list[tuple[Block, int]]:
    return [(block, i) for block in axis for i in range(block.width)]


@given(st.lists(axis_pairs, max_size=3), st.integers(0, 2**32))
@some_examples
def test_carry_equals_a_loop_over_places(pairs: list[tuple[Axis, Axis]], seed: int) -> None:
    axes, their_axes = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    generator = torch.Generator().manual_seed(seed)
    weight, theirs = (torch.randn([width(axis) for axis in a], generator=generator) for a in (axes, their_axes))
    named = dict(zip(itertools.product(*map(places, their_axes)), theirs.flatten().tolist(), strict=True))
    blocks_of = [set(axis) for axis in their_axes]
    expected, copied = weight.clone().flatten(), 0
    for i, place in enumerate(itertools.product(*map(places, axes))):
        new = [block for (block, _), known in zip(place, blocks_of, strict=True) if block not in known]
        if not new:
            expected[i], copied = named[place], copied + 1
        elif len(new) == 1 and new[0].kind == "feature" and all(set(a) & b for a, b in zip(axes, blocks_of, strict=True)):
            expected[i] = 0.0
    how_much = carry(weight, axes, theirs, their_axes)
    assert torch.equal(weight.flatten(), expected)
    assert how_much == ("all" if copied == weight.numel() else "some" if copied else "none")


# Towers: a random part of the features and tasks of one recipe then, another part in another order now.

FEATURES = [
    *({"name": f"id{i}", "kind": "id", "table": f"t{i % 3}", "side": SIDES[i % 3]} for i in range(5)),
    *({"name": f"dense{i}", "kind": "vector", "size": 1 + i, "side": SIDES[i % 3]} for i in range(3)),
]
DIMS = {"t0": 4, "t1": 8, "t2": 4}
TASKS = [{"name": f"task{i}", "kind": "binary", "label": f"label{i}"} for i in range(4)]


def part_of(rng: Random, section: ModelSection, features: list[str], tasks: list[str]) -> Recipe:
    """With these features and tasks, in a random order."""
    chosen = [f for f in FEATURES if f["name"] in {*features, "id0", "id1"}]
    used = {f["table"] for f in chosen if "table" in f}
    return Recipe.model_validate(
        {
            "data": {"root": "."},
            "tables": [{"name": name, "rows": 5, "dim": dim} for name, dim in DIMS.items() if name in used],
            "features": rng.sample(chosen, len(chosen)),
            "tasks": rng.sample([t for t in TASKS if t["name"] in tasks], len(tasks)),
            "model": section,
            "retrieval": {"user": "id0", "item": "id1", "dim": 4, "layers": [4]},
        }
    )


def drawn_tower(recipe: Recipe, seed: int) -> Tower:
    torch.manual_seed(seed)
    tower = Tower(recipe.model, recipe.retrieval, recipe.data_schema, recipe.tables, "fp32").double()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return tower


def answers(tower: Tower, recipe: Recipe, values: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The logits of each task and the affinity, from each feature's numbers."""
    schema = recipe.data_schema
    vectors = {
        side: torch.cat([values[f.name] for f in schema.features if f.is_id and f.side == side], dim=1)
        for side in SIDES
        if any(f.is_id and f.side == side for f in schema.features)
    }
    dense_BD = torch.cat([values[f.name] for f in schema.dense_features] + [torch.zeros(8, 0).double()], dim=1)
    outputs = tower(vectors, dense_BD)
    assert outputs.affinity_B is not None
    return {task.name: outputs.logits_BT[:, t] for t, task in enumerate(recipe.tasks)}, outputs.affinity_B


def carry_tower(old: Tower, new: Tower) -> None:
    theirs, ours, weights = old.axes(), new.axes(), dict(old.named_parameters())
    for name, weight in new.named_parameters():
        carry(weight.data, ours[name], weights[name].data, theirs[name])
    for name, module in new.named_modules():
        if isinstance(module, Gates):
            bias = f"{name}.linear.bias_GO"
            module.start_new_experts(*(origins(*axes) >= 0 for axes in zip(ours[bias], theirs[bias], strict=True)))


some_features = st.lists(st.sampled_from([str(f["name"]) for f in FEATURES]), unique=True)


@given(sections, some_features, some_features, st.integers(0, 2**32))
@some_examples
def test_other_features_in_another_order_change_no_answer(section: ModelSection, then: list[str], now: list[str], seed: int) -> None:
    """What was there answers as if what is gone was 0, and what is new did not exist."""
    rng, tasks = Random(seed), [task["name"] for task in TASKS[:3]]
    old, new = (part_of(rng, section, names, tasks) for names in (then, now))
    old_tower, new_tower = drawn_tower(old, seed), drawn_tower(new, seed + 1)
    carry_tower(old_tower, new_tower)
    widths = {str(f["name"]): DIMS[f["table"]] if "table" in f else f["size"] for f in FEATURES}
    values: dict[str, Any] = {name: torch.randn(8, size).double() for name, size in widths.items()}
    left = {f.name for f in new.features}
    expected = answers(old_tower, old, {name: value * (name in left) for name, value in values.items()})
    found = answers(new_tower, new, values)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


some_tasks = st.lists(st.sampled_from([task["name"] for task in TASKS]), unique=True, min_size=1)


@given(sections, some_tasks, some_tasks, st.integers(0, 2**32))
@some_examples
def test_other_tasks_in_another_order_change_no_answer(section: ModelSection, then: list[str], now: list[str], seed: int) -> None:
    """But where PLE's shared gates see the experts of all tasks: there it is next to nothing, for tasks that are added."""
    rng, names = Random(seed), ["dense1", "id2"]
    old, new = (part_of(rng, section, names, tasks) for tasks in (then, now))
    old_tower, new_tower = drawn_tower(old, seed), drawn_tower(new, seed + 1)
    carry_tower(old_tower, new_tower)
    values: dict[str, Any] = {f["name"]: torch.randn(8, DIMS[f["table"]] if "table" in f else f["size"]).double() for f in FEATURES}
    (expected, expected_affinity), (found, affinity) = answers(old_tower, old, values), answers(new_tower, new, values)
    torch.testing.assert_close(affinity, expected_affinity, rtol=1e-10, atol=1e-12)
    sees_all = section.sharing == "ple" and section.levels > 1
    if sees_all and set(then) - set(now):
        return  # the shared gate has lost experts
    bound = {"rtol": 0.01, "atol": 0.01} if sees_all and set(now) - set(then) else {"rtol": 1e-10, "atol": 1e-12}
    for name in set(then) & set(now):
        torch.testing.assert_close(found[name], expected[name], **bound)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
@some_examples
def test_new_experts_have_a_bounded_share_in_trained_gates(num_gates: int, num_known: int, num_new: int, seed: int) -> None:
    torch.manual_seed(seed)
    gates = Gates(num_gates + 1, 6, num_known + num_new).double()
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    before = [parameter.detach().clone() for parameter in gates.parameters()]
    known_G = torch.arange(num_gates + 1) < num_gates
    known_E = torch.randperm(num_known + num_new) < num_known
    gates.start_new_experts(known_G, known_E)
    for parameter, was in zip(gates.parameters(), before, strict=True):
        assert torch.equal(parameter[..., known_E], was[..., known_E])
        assert torch.equal(parameter[~known_G], was[~known_G])
    share_GB = gates.weights(torch.randn(50, 6).double())[:-1, :, ~known_E].sum(-1)
    assert bool((share_GB <= num_new / num_known * torch.tensor(-QUIET).exp() * (1 + 1e-9)).all()) and bool((share_GB > 0).all())


def test_a_hidden_expert_is_not_counted() -> None:
    visible_GE = torch.tensor([[True, False, True], [False, True, True]])
    gates = Gates(2, 3, 3, visible_GE)
    bias = torch.tensor([[1.0, 50.0, 7.0], [50.0, 3.0, 7.0]])
    gates.linear.bias_GO.data.copy_(bias)
    gates.start_new_experts(torch.tensor([True, True]), torch.tensor([True, True, False]))
    expected = torch.tensor([[1.0, 50.0, 1.0 - QUIET], [50.0, 3.0, 3.0 - QUIET]])
    torch.testing.assert_close(gates.linear.bias_GO.data, expected, rtol=0, atol=0)


def test_a_gate_that_knows_none_of_its_experts_stays() -> None:
    gates = Gates(2, 3, 2)
    before = gates.linear.weight_GIO.detach().clone()
    gates.start_new_experts(torch.tensor([True, True]), torch.tensor([False, False]))
    assert torch.equal(gates.linear.weight_GIO, before)


def test_a_width_that_differs_is_another_block() -> None:
    ours, theirs = (Block("feature", "a", 2), Block("feature", "b", 1)), (Block("feature", "b", 1), Block("feature", "a", 3))
    assert origins(ours, theirs).tolist() == [-1, -1, 0]


@pytest.mark.parametrize("axes", [(), ((Block("unit", "", 3),),)])
def test_the_same_axes_carry_all(axes: Axes) -> None:
    weight, theirs = torch.zeros([width(a) for a in axes]), torch.randn([width(a) for a in axes])
    assert carry(weight, axes, theirs, axes) == "all" and torch.equal(weight, theirs)
