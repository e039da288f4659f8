"""Recipe -> sharded model, optimizers, and the named tensors that make up their state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ..embeddings.lookup import Lookup
from ..embeddings.optimizer import replicated_optimizer
from ..embeddings.sharding import describe, shard
from ..embeddings.tables import meta_collection
from ..mmoe.model import Recommender, Tower
from ..mmoe.train_task import Objective, TrainTask
from .checkpoint import Reader
from .config import Recipe
from .distributed import Ranks

TABLES = ".embedding_bags."


class Optimizers:
    """Several optimizers as one, for the pipeline; the tables' fused one acts inside backward and is not among them."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def train_task(recipe: Recipe) -> TrainTask:
    """The unsharded model: tables on meta, dense weights initialised from the recipe's seed."""
    torch.manual_seed(recipe.train.seed)
    schema = recipe.data_schema
    tower = Tower(recipe.model, recipe.retrieval, schema, recipe.tables, recipe.train.precision)
    model = Recommender(Lookup(meta_collection(recipe.tables, schema), schema), tower)
    return TrainTask(model, Objective(recipe.tasks, schema, recipe.retrieval))


@dataclass
class Built:
    """A sharded model ready to train or predict."""

    model: DistributedModelParallel
    optimizers: Optimizers
    dense_params: dict[str, nn.Parameter]
    """Every parameter that no fused optimizer updates, tables that all ranks hold whole included."""

    @property
    def task(self) -> TrainTask:
        return self.model.module

    def plan(self) -> dict[str, Any]:
        return describe(self.model.plan)


def build(recipe: Recipe, ranks: Ranks) -> Built:
    """Collective: shard the recipe's model over all ranks.

    Raises:
        InputError: no sharding plan fits.
    """
    section = recipe.train
    model = shard(
        train_task(recipe), recipe.tables, device=ranks.device, local_world_size=ranks.local_world_size, batch_size=recipe.data.batch_size,
        optimizer=section.embedding_optimizer, lr=section.embedding_lr, eps=section.embedding_eps, seed=section.seed,
    )  # fmt: skip
    torch.manual_seed(section.seed * 100_003 + ranks.rank)  # dropout differs between ranks
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = [parameter for name, parameter in dense.items() if TABLES in name]
    others = [parameter for name, parameter in dense.items() if TABLES not in name]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=section.lr, weight_decay=section.weight_decay)]
    if replicated:
        parts.append(replicated_optimizer(section.embedding_optimizer, replicated, section.embedding_lr, section.embedding_eps))
    return Built(model, Optimizers(*parts), dense)


def model_state(built: Built) -> dict[str, torch.Tensor | ShardedTensor]:
    return {f"model/{name}": value for name, value in built.model.state_dict().items()}


def _dense_states(built: Built) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    owners = {id(p): part for part in built.optimizers.parts for group in part.param_groups for p in group["params"]}
    for name, parameter in built.dense_params.items():
        yield name, parameter, owners[id(parameter)]


def _fused_state(built: Built) -> dict[str, torch.Tensor | ShardedTensor]:
    return {
        f"optimizer/{parameter}/sum": value
        for parameter, its_state in built.model.fused_optimizer.state_dict()["state"].items()
        for key, value in its_state.items()
        if key.endswith("momentum1")
    }


def optimizer_state(built: Built) -> dict[str, torch.Tensor | ShardedTensor]:
    """Named state of every optimizer. A table's accumulator has one name and shape, fused or replicated."""
    state = _fused_state(built)
    for name, parameter, optimizer in _dense_states(built):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and not (TABLES in name and key == "step"):
                one_a_row = TABLES in name and value.shape != parameter.shape
                state[f"optimizer/{name}/{key}"] = value.flatten() if one_a_row else value
    return state


def load_model(built: Built, reader: Reader) -> None:
    """Fill the model from a checkpoint of any plan and number of ranks.

    Raises:
        InputError: names the tensor that is missing or has another shape.
    """
    for name, value in model_state(built).items():
        reader.copy_into(name, value)


def load_optimizers(built: Built, reader: Reader) -> None:
    """Fill every optimizer's state from a checkpoint.

    Raises:
        InputError: as load_model.
    """
    for name, value in _fused_state(built).items():
        reader.copy_into(name, value)
    for name, parameter, optimizer in _dense_states(built):
        prefix = f"optimizer/{name}/"
        for saved in sorted(saved for saved in reader.names() if saved.startswith(prefix)):
            key, value = saved.removeprefix(prefix), reader.read(saved)
            if TABLES in name:
                value = value.view_as(optimizer.state[parameter][key])
            optimizer.state[parameter][key] = value.to(parameter.device) if value.dim() else value
