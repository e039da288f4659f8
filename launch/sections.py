"""`[train]`: how long, how fast, how often to look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..datasets.schema import DataSection, Label, Section, nearest
from ..embeddings.optimizer import TableOptimizer, TableTraining
from ..embeddings.sharding import Comms

METRICS = {"binary": ("auc", "gauc", "ne", "logloss"), "duration": ("mae", "rmse", "xauc")}
BETTER_WHEN_LARGE = {"auc", "gauc", "xauc"}


class TrainSection(Section):
    """`[train]`."""

    epochs: PositiveInt = 1
    lr: PositiveFloat = 0.001
    """Adam's learning rate, for everything but tables."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW), for everything but tables."""
    embedding_lr: PositiveFloat = 0.02
    embedding_optimizer: TableOptimizer = "rowwise_adagrad"
    """adam: CUDA only."""
    embedding_eps: PositiveFloat = 1e-8
    """Added to the root of Adagrad's accumulator."""
    embedding_weight_decay: NonNegativeFloat = 0.0
    """L2 on the rows of tables that a step looks up; rowwise_adagrad and adam."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of both learning rates after the warm-up: how they fall to `final_lr` of themselves by the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which both learning rates rise linearly, from 1 / warmup_steps of themselves."""
    final_lr: float = Field(default=0.0, ge=0.0, le=1.0)
    """linear and cosine: the share of the learning rates that is left at the end."""
    comms: Comms = "fp32"
    """Width of the vectors and gradients of tables on their way between ranks. fp16 halves the traffic; predictions then depend on the plan
    in the fourth digit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tower's matrix products; tables, losses and optimizers stay fp32."""
    clip_norm: PositiveFloat | None = None
    """Bound on the norm of the gradient of everything but tables, over all ranks and weights."""
    embedding_clip_norm: PositiveFloat | None = None
    """Bound on the norm of the gradient of each looked-up vector, times the rows of a batch: of the gradient of a row's own loss. So it
    means the same for any batch_size, number of ranks and plan."""
    max_bad_steps: NonNegativeInt = 10
    """Steps with a loss or gradient that is not finite, over all the run and its resumes, that are skipped; one more ends the run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every: PositiveInt = 20
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: NonNegativeInt = 0
    """Steps between two evaluations on `valid`; 0: at the end of every epoch."""
    patience: NonNegativeInt = 0
    """Stop after this many evaluations in a row without a better `monitor`; 0: never. The best one is kept in any case."""
    timeout_s: PositiveInt = 1800
    """Seconds without progress on any rank after which the run is ended, naming who hangs; also how long ranks wait to find each other.
    After a sixth of it, at least 15 s, without a sign of life of another node, that node is lost."""
    monitor: str | None = None
    """Metric that says which evaluation is best, as in "ctr.auc"; the first task's AUC (XAUC for a duration), unless given."""

    @model_validator(mode="after")
    def _final_lr_goes_with_a_schedule(self) -> TrainSection:
        if self.schedule == "constant" and self.final_lr:
            raise ValueError("final_lr goes with schedule = 'linear' or 'cosine'")
        return self

    @property
    def table_training(self) -> TableTraining:
        return TableTraining(self.embedding_optimizer, self.embedding_lr, self.embedding_eps, self.embedding_weight_decay)

    def watched(self, tasks: Sequence[Label]) -> tuple[str, str]:
        """(task, metric) of the monitor."""
        if self.monitor is None:
            return tasks[0].name, "auc" if tasks[0].kind == "binary" else "xauc"
        task, _, metric = self.monitor.rpartition(".")
        return task, metric

    def check_monitor(self, tasks: Sequence[Label], data: DataSection) -> None:
        task, metric = self.watched(tasks)
        kinds = {label.name: label.kind for label in tasks}
        if task not in kinds:
            raise ValueError(f"train.monitor = '{self.monitor}': no task '{task}'{nearest(task, kinds)}")
        if metric not in METRICS[kinds[task]]:
            raise ValueError(f"train.monitor = '{self.monitor}': metric must be one of {', '.join(METRICS[kinds[task]])}")
        if metric == "gauc" and data.group is None:
            raise ValueError(f"train.monitor = '{self.monitor}' needs data.group")
