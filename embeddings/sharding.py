"""Tables -> parts on every rank: sharders, DistributedModelParallel, and the parts' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan, ShardingType

from .optimizer import TableTraining
from .tables import PREFIX, EmbeddingTable, fill_table

Comms = Literal["fp32", "fp16"]
IN_BAGS, IN_SEQUENCES = ".embedding_bags.", ".embeddings."
"""Parts of the names of what belongs to a table, by the collection that holds it."""


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with row-wise and table-row-wise sharding on CPU too: gloo serves them, only the stock list leaves them out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        ours = [ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value]
        return list(dict.fromkeys([*super().sharding_types(compute_device_type), *ours]))


def sharders(training: TableTraining, comms: Comms = "fp32", device: torch.device | None = None, *, prefetches: bool = False) -> list[Any]:
    """One for each collection.

    Args:
        comms: width of the vectors and gradients that ranks exchange.
        prefetches: the training pipeline brings rows into the caches of `uvm_caching` tables ahead of need.
    """
    codecs = None
    if comms == "fp16":
        config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
        codecs = get_qcomm_codecs_registry(config, device=device)
    fused_params = training.fused_params() | ({"prefetch_pipeline": True} if prefetches else {})
    common: dict[str, Any] = {"fused_params": fused_params, "qcomm_codecs_registry": codecs}
    return [BagSharder(**common), EmbeddingCollectionSharder(**common, use_index_dedup=False)]


def prefetches(tables: Sequence[EmbeddingTable], device: torch.device) -> bool:
    """Whether tables have caches to bring rows into. On CPU there is one memory."""
    return device.type == "cuda" and any(table.memory == "uvm_caching" for table in tables)


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    tables: Sequence[EmbeddingTable],
    training: TableTraining,
    *,
    device: torch.device,
    seed: int | None,
    comms: Comms = "fp32",
) -> DistributedModelParallel:
    """Shard and initialise a model whose tables are on meta. Collective: every rank calls it with the same plan.

    The initial table weights depend on `seed` alone, not on the plan; without one they are 0. The dense weights of rank 0 go to all ranks.
    """
    their_sharders = sharders(training, comms, device, prefetches=prefetches(tables, device))
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=their_sharders)
    weights = table_weights(sharded)
    for table in tables:
        if seed is not None and table.ids != "dynamic":  # there a row begins when an id gets it
            fill_table(weights[table.name], table, seed)
    return sharded


def of_table(name: str) -> str | None:
    """The table that a named weight, or a part of an optimizer's state, belongs to; None for what is dense."""
    if IN_BAGS not in name and IN_SEQUENCES not in name:
        return None
    return next(part.removeprefix(PREFIX) for part in name.split(".") if part.startswith(PREFIX))


def table_weights(model: nn.Module) -> dict[str, torch.Tensor | ShardedTensor]:
    """{table: weight}, sharing memory with the tables: a ShardedTensor, or a plain tensor where every rank holds it whole."""
    return {table: weight for name, weight in model.state_dict().items() if (table := of_table(name)) is not None}
