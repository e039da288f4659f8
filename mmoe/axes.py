"""What the places of a weight stand for: features, tasks and experts by name. So weights find their places in another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

Kind = Literal["feature", "task", "expert", "gate", "place", "unit"]


class Block(NamedTuple):
    """Neighbouring places of one dimension that belong to one thing."""

    kind: Kind
    name: str
    """unit: empty. Units of a layer have no names, and are the same only if all of them are there."""
    width: int


Axis = tuple[Block, ...]
"""One dimension: blocks side by side, each at most once."""
Axes = tuple[Axis, ...]
"""All dimensions of a weight."""


def units(width: int) -> Axis:
    return (Block("unit", "", width),)


def numbered(kind: Kind, count: int) -> Axis:
    return tuple(Block(kind, str(i), 1) for i in range(count))


def width(axis: Axis) -> int:
    return sum(block.width for block in axis)


def within(module: str, axes: Mapping[str, Axes]) -> dict[str, Axes]:
    """The axes of a submodule's weights, by their names in the module around it."""
    return {f"{module}.{name}": its_axes for name, its_axes in axes.items()}


def origins(axis: Axis, their_axis: Axis) -> torch.Tensor:
    """Where each place of an axis is in another one, int64 [width]; -1 where the other has no such block, or one of another width."""
    begins, begin = {}, 0
    for block in their_axis:
        begins[block] = begin
        begin += block.width
    parts = [torch.arange(b.width) + begins[b] if b in begins else torch.full((b.width,), -1) for b in axis]
    return torch.cat(parts)


@torch.no_grad()
def carry(weight: torch.Tensor, axes: Axes, their_weight: torch.Tensor, their_axes: Axes) -> Literal["all", "some", "none"]:
    """Copy what stands for the same from another model's weight; how much of this one that was.

    Where a feature is new to something that is not, its weights become 0: the layer answers as it did without the feature. What
    is new otherwise stays as it is.
    """
    assert list(weight.shape) == [width(axis) for axis in axes] and list(their_weight.shape) == [width(axis) for axis in their_axes]
    origin = [origins(axis, their_axis) for axis, their_axis in zip(axes, their_axes, strict=True)]
    known = [torch.nonzero(o >= 0).flatten() for o in origin]
    if any(len(k) == 0 for k in known):
        return "none"
    for dimension, axis in enumerate(axes):
        is_feature = torch.cat([torch.full((block.width,), block.kind == "feature") for block in axis])
        added = torch.nonzero(is_feature & (origin[dimension] < 0)).flatten()
        weight[_crossed([*known[:dimension], added, *known[dimension + 1 :]])] = 0.0
    theirs = their_weight[_crossed([o[k] for o, k in zip(origin, known, strict=True)])]
    weight[_crossed(known)] = theirs.to(weight)
    return "all" if theirs.numel() == weight.numel() else "some"


def _crossed(places: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """An index of every combination of places, one list of them a dimension."""
    return tuple(place.view([-1 if d == dimension else 1 for d in range(len(places))]) for dimension, place in enumerate(places))
