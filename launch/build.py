"""Recipe -> sharded model, optimizers, and the named tensors that make up their state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ..datasets.batch import Batch
from ..embeddings.dynamic.batches import DynamicBatches, dynamic_tables
from ..embeddings.dynamic.fresh import FreshRows, Held
from ..embeddings.dynamic.fresh import Part as FreshPart
from ..embeddings.lookup import Lookup
from ..embeddings.memory import DeviceType, Machine, this_machine
from ..embeddings.plan import Plan, make_plan, saved_plan
from ..embeddings.sharding import of_table, shard, sharders
from ..embeddings.tables import EmbeddingTable, meta_collections
from ..mmoe.model import Recommender, Tower
from ..mmoe.train_task import Objective, TrainTask
from .checkpoints.parts import State, local_parts
from .checkpoints.reader import Reader
from .config import Recipe
from .distributed import Ranks


class Optimizers:
    """Several optimizers as one, for the pipeline.

    Args:
        fused: the tables', which acts inside backward: here it only takes its learning rate.
        dense: of everything but tables.
        replicated: of tables that every rank holds whole, if there are any.
        clip_norm: bound on the norm of the gradient of all that `dense` updates.
    """

    def __init__(
        self, fused: Any, dense: torch.optim.Optimizer, *replicated: torch.optim.Optimizer, clip_norm: float | None = None
    ) -> None:
        self.fused, self.dense, self.replicated, self.clip_norm = fused, dense, replicated, clip_norm
        self.parts = (dense, *replicated)
        self.rates = [(group, group["lr"]) for part in (fused, *self.parts) for group in part.param_groups]
        self.gradients_finite = True
        """Whether the norm of the dense gradient of the last step was. Ranks have the same gradient, and so the same answer."""

    def scale_rates(self, factor: float) -> None:
        """Set every learning rate to `factor` times the recipe's."""
        for group, lr in self.rates:
            group["lr"] = lr * factor
        self.fused.zero_grad()  # hands the rate on to the kernels

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Where the dense gradient is not finite, dense weights stay as they are. Gradients of tables are guarded on their way."""
        parameters = [parameter for group in self.dense.param_groups for parameter in group["params"]]
        norm = get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
        self.gradients_finite = bool(torch.isfinite(norm))
        if self.gradients_finite:
            if self.clip_norm is not None:
                clip_grads_with_norm_(parameters, self.clip_norm, norm)
            self.dense.step()
        for part in self.replicated:
            part.step()


def train_task(recipe: Recipe) -> TrainTask:
    """The unsharded model: tables on meta, dense weights initialised from the recipe's seed."""
    torch.manual_seed(recipe.train.seed)
    schema = recipe.data_schema
    tower = Tower(recipe.model, recipe.retrieval, schema, recipe.tables, recipe.train.precision)
    collections = meta_collections(recipe.tables, schema)
    for collection in (collections.bags, collections.sequences):
        if collection is not None:
            recipe.train.table_training.attach(collection, recipe.tables)
    clip = recipe.train.embedding_clip_norm
    # A loss is a mean over the rows of all ranks, times the number of ranks, as gradients are averaged.
    gradient_bound = None if clip is None else clip / recipe.data.batch_size
    model = Recommender(Lookup(collections, schema, recipe.model.attention_layers, gradient_bound), tower)
    fresh_rows = FreshRows(recipe.train.seed) if dynamic_tables(recipe.tables) else None
    return TrainTask(model, Objective(recipe.tasks, schema, recipe.retrieval), fresh_rows)


def plan_of(recipe: Recipe, machine: Machine, run: Path | None = None) -> Plan:
    """Which rank holds which part of which table. Needs no process group.

    Args:
        run: a run folder, whose plan is taken where it was made for the same tables, ranks and devices.
    Raises:
        InputError: nothing fits; says what would. Or the device lacks the tables' optimizer.
    """
    training, model = recipe.train.table_training, train_task(recipe)
    training.check_device(machine.device_type)
    saved = saved_plan(_read_plan(run), model, recipe.tables, recipe.data_schema, training, machine) if run is not None else None
    return saved or make_plan(model, sharders(training), recipe.tables, recipe.data_schema, training, machine)


def _read_plan(run: Path) -> dict[str, Any]:
    """A run's plan.json; nothing if it is lost, as another plan trains the same model."""
    try:
        return dict(json.loads((run / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass
class Built:
    """A sharded model ready to train or predict."""

    model: DistributedModelParallel
    optimizers: Optimizers
    dense_params: dict[str, nn.Parameter]
    """Every parameter that no fused optimizer updates, tables that all ranks hold whole included."""
    plan: Plan
    dynamic: DynamicBatches | None
    """None where no table has dynamic ids."""
    device: torch.device

    @property
    def task(self) -> TrainTask:
        return self.model.module

    def found(self, batch: Batch) -> Batch:
        """A batch as the files have it -> as the model takes it, to predict. Collective."""
        return batch if self.dynamic is None else self.dynamic.found(batch)


def build(recipe: Recipe, ranks: Ranks, plan: Plan | None = None, *, initialise: bool = True) -> Built:
    """Collective: shard the recipe's model over all ranks.

    Args:
        plan: the first rank's counts; made here, unless given.
        initialise: False leaves tables at 0, for a checkpoint to fill.
    Raises:
        InputError: no sharding plan fits.
    """
    section, training = recipe.train, recipe.train.table_training
    machine = this_machine(cast(DeviceType, ranks.device.type), ranks.world_size, ranks.local_world_size)
    plan = ranks.from_first(lambda: plan or plan_of(recipe, machine))
    seed = section.seed if initialise else None
    model = shard(train_task(recipe), plan.sharding, recipe.tables, training, device=ranks.device, seed=seed, comms=section.comms)
    torch.manual_seed(section.seed * 100_003 + ranks.rank)  # dropout differs between ranks
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = {table: parameter for name, parameter in dense.items() if (table := of_table(name)) is not None}
    others = [parameter for name, parameter in dense.items() if of_table(name) is None]
    adam = torch.optim.AdamW(others, lr=section.lr, weight_decay=section.weight_decay)
    of_replicated = [training.replicated(replicated, recipe.tables)] if replicated else []
    dynamic = dynamic_tables(recipe.tables)
    batches = DynamicBatches(recipe.tables, recipe.data_schema, ranks.rank, ranks.world_size, ranks.own_group()) if dynamic else None
    built = Built(
        model, Optimizers(model.fused_optimizer, adam, *of_replicated, clip_norm=section.clip_norm), dense, plan, batches, ranks.device
    )
    if built.task.fresh_rows is not None:
        built.task.fresh_rows.bind({number: _held(built, table) for number, table in enumerate(dynamic)})
    return built


def _held(built: Built, table: EmbeddingTable) -> Held:
    """What this rank holds of a table."""

    def parts(state: dict[str, torch.Tensor | ShardedTensor]) -> list[FreshPart]:
        values = [value for name, value in state.items() if of_table(name) == table.name]
        return [FreshPart(part.tensor, part.offsets[0], *part.offsets[1:]) for value in values for part in local_parts(value)]

    return Held(table, parts(table_state(built)), parts(optimizer_state(built)))


def table_state(built: Built) -> dict[str, torch.Tensor | ShardedTensor]:
    return {f"model/{name}": value for name, value in built.model.state_dict().items()}


def model_state(built: Built) -> State:
    """Named weights, and which id has which row."""
    ids = {} if built.dynamic is None else {f"ids/{name}": shard for name, shard in built.dynamic.state().items()}
    return {**table_state(built), **ids}


def _dense_states(built: Built) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    owners = {id(p): part for part in built.optimizers.parts for group in part.param_groups for p in group["params"]}
    for name, parameter in built.dense_params.items():
        yield name, parameter, owners[id(parameter)]


def _fused_state(built: Built) -> dict[str, torch.Tensor | ShardedTensor]:
    # FBGEMM calls the first state of any optimizer momentum1; of Adagrad it is what torch calls sum.
    return {
        f"optimizer/{parameter}/{'sum' if key.endswith('.momentum1') else key.rpartition('.')[2]}": value
        for parameter, its_state in built.model.fused_optimizer.state_dict()["state"].items()
        for key, value in its_state.items()
    }


def optimizer_state(built: Built) -> dict[str, torch.Tensor | ShardedTensor]:
    """Named state of every optimizer. A table's accumulator has one name and shape, fused or replicated."""
    state = _fused_state(built)
    for name, parameter, optimizer in _dense_states(built):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and not (of_table(name) and key == "step"):
                one_a_row = of_table(name) is not None and value.shape != parameter.shape
                state[f"optimizer/{name}/{key}"] = value.flatten() if one_a_row else value
    return state


def load_model(built: Built, reader: Reader) -> None:
    """Fill the model from a checkpoint of any plan and number of ranks.

    Raises:
        InputError: names the tensor that is missing or has another shape.
    """
    for name, value in model_state(built).items():
        reader.copy_into(name, value)
    if built.dynamic is not None:
        built.dynamic.ids.loaded()


def load_optimizers(built: Built, reader: Reader) -> None:
    """Fill every optimizer's state from a checkpoint.

    Raises:
        InputError: as load_model.
    """
    for name, value in _fused_state(built).items():
        reader.copy_into(name, value)
    built.optimizers.fused.set_optimizer_step(reader.manifest["step"])  # Adam's bias correction depends on it
    for name, parameter, optimizer in _dense_states(built):
        prefix = f"optimizer/{name}/"
        for saved in sorted(saved for saved in reader.names() if saved.startswith(prefix)):
            key, value = saved.removeprefix(prefix), reader.read(saved)
            if key in optimizer.state[parameter]:  # others may hold it, as fresh rows do
                held = optimizer.state[parameter][key]
                held.copy_(value.view_as(held))
            else:
                optimizer.state[parameter][key] = value.to(parameter.device) if value.dim() else value
