"""What a recipe says of the data: files, features, tables' ids, tasks' labels, and the checks between them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

SIDES = ("user", "item", "context")
Eviction = Literal["distance_lfu", "lru", "lfu"]


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what, where, what to do. The command line exits with 2."""


class Section(BaseModel):
    """A part of the recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def reject_foreign_keys(section: Section, what: str, goes_with: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError for a key that is set, other than to its default, although it means nothing for the section's kind."""
    kind = getattr(section, "kind")  # noqa: B009
    for key, kinds in goes_with.items():
        if kind not in kinds and getattr(section, key) != type(section).model_fields[key].default:
            raise ValueError(f"{what} of kind '{kind}': key '{key}' goes with kind {' or '.join(map(repr, kinds))}")


class DataSection(Section):
    """`[data]`: where the rows are and how they are dealt into batches."""

    root: str
    """Folder of the files below, relative to the working directory; or a URL: s3, gs, hdfs and what else fsspec knows."""
    train: str | None = None
    """A file, a folder of parquet files, or a glob, relative to `root`; so are `valid`, `test` and `items`."""
    valid: str | None = None
    test: str | None = None
    items: str | None = None
    """Catalogue for retrieval: one row an item, with every item-side column."""
    scenario: str | None = None
    """Column by whose values metrics are also reported."""
    group: str | None = None
    """Column for grouped AUC, usually the user."""
    time: str | None = None
    """Column that says when. Where users occur in several rows, export takes the latest by it."""
    weight: str | None = None
    """Column of row weights, at least 0, for losses and metrics."""
    batch_size: PositiveInt = 4096
    """Rows per rank and step."""
    shuffle: bool = True
    shuffle_row_groups: PositiveInt = 8
    """Row groups open at the same time. A batch draws evenly from all of them, in random row order within each."""
    memory_mb: PositiveInt = 2048
    """Decoded rows that one rank holds, about. Row groups that are too large for it are read, and shuffled, in slices."""
    workers: NonNegativeInt = 1
    """Threads that decode, ahead of need. 0: everything is read in the training thread, when it is needed."""
    prefetch: PositiveInt = 4
    """Batches made ahead in the background."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """What happens to files and row groups that cannot be read or hold what the recipe does not allow. skip: their rows are left out
    and counted, in result.json and the log."""


class TableIds(Section):
    """The part of `[[tables]]` that reading needs: how a raw id becomes a row."""

    name: str
    rows: PositiveInt
    ids: Literal["hash", "index", "vocabulary", "dynamic"] = "hash"
    """hash: any integer or string, modulo rows after mixing. index: the integer is the row. vocabulary: the values of the training files,
    the most frequent ones if rows do not suffice, have a row each; row 0 stands for all others. dynamic: an id gets a row of its own when
    training meets it, and may lose it to another when the table is full; row 0 stands for ids without one."""
    min_count: PositiveInt = 1
    """vocabulary and dynamic: ids that occur less often share row 0."""
    eviction: Eviction = "distance_lfu"
    """dynamic: who loses its row: the lowest frequency over time unseen, the longest unseen, or the least frequent."""
    key_file: str | None = None
    """hash: a file with a secret of at least 16 bytes. Ids are hashed with it, and exports hold the hashes instead of the ids."""

    @model_validator(mode="after")
    def _keys_go_with_ids(self) -> TableIds:
        if self.ids not in ("vocabulary", "dynamic") and self.min_count != 1:
            raise ValueError(f"table '{self.name}': min_count goes with ids = 'vocabulary' or 'dynamic'")
        if self.ids != "dynamic" and self.eviction != "distance_lfu":
            raise ValueError(f"table '{self.name}': eviction goes with ids = 'dynamic'")
        if self.ids == "dynamic" and self.rows < 2:
            raise ValueError(f"table '{self.name}': dynamic ids need at least 2 rows")
        if self.ids != "hash" and self.key_file is not None:
            raise ValueError(f"table '{self.name}': key_file goes with ids = 'hash'")
        return self


class Feature(Section):
    """`[[features]]`: one column that the model reads."""

    name: str = Field(min_length=1)
    column: str = ""
    """Column in the files; the name, unless given."""
    kind: Literal["id", "ids", "dense", "vector"]
    """id: one id a row. ids: a list of ids. dense: a number. vector: a list of `size` numbers."""
    table: str | None = None
    side: Literal["user", "item", "context"] = "context"
    pooling: Literal["mean", "sum", "attention"] = "mean"
    """ids. attention: a sum weighted by how each id meets the `target` (Zhou et al., KDD 2018)."""
    max_length: PositiveInt | None = None
    """ids: keep only the last `max_length` of a list."""
    target: str | None = None
    """attention: the id feature of the same table that lists are held against; the item's, unless given."""
    positions: bool = False
    """attention: a learned vector for each place in the list, counted from its end. Needs `max_length`."""
    transform: Literal["none", "log1p", "standard", "quantile"] = "none"
    """dense and vector. standard: mean 0 and standard deviation 1. quantile: the share of training values below, 0 to 1. Both are fitted
    on the training files."""
    scale: float = 1.0
    """dense and vector: factor after the transform."""
    buckets: tuple[float, ...] | None = None
    """id: cut a number at these ascending edges; the id is the count of edges at or below it."""
    default: int | float | str | None = None
    """Stands for a null. Without it a null is an error."""
    size: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _column_is_the_name(cls, values: object) -> object:
        if isinstance(values, dict) and not values.get("column"):
            return {**values, "column": values.get("name", "")}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Feature:
        is_id = self.kind in ("id", "ids")
        if is_id and self.table is None:
            raise ValueError(f"feature '{self.name}' of kind '{self.kind}' needs a table")
        goes_with = {
            "table": ("id", "ids"),
            "pooling": ("ids",),
            "max_length": ("ids",),
            "target": ("ids",),
            "positions": ("ids",),
            "transform": ("dense", "vector"),
            "scale": ("dense", "vector"),
            "buckets": ("id",),
            "default": ("id", "dense"),
            "size": ("vector",),
        }
        reject_foreign_keys(self, f"feature '{self.name}'", goes_with)
        for key in ("target", "positions"):
            if getattr(self, key) and self.pooling != "attention":
                raise ValueError(f"feature '{self.name}': {key} goes with pooling = 'attention'")
        if self.positions and self.max_length is None:
            raise ValueError(f"feature '{self.name}': positions needs max_length")
        if self.kind == "vector" and self.size is None:
            raise ValueError(f"feature '{self.name}' of kind 'vector' needs a size")
        if self.buckets is not None and list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"feature '{self.name}': buckets must ascend")
        if isinstance(self.default, str) and (self.kind == "dense" or self.buckets is not None):
            raise ValueError(f"feature '{self.name}': default must be a number")
        return self

    @property
    def is_id(self) -> bool:
        return self.kind in ("id", "ids")

    @property
    def width(self) -> int:
        """Columns this feature takes in the dense matrix."""
        return 0 if self.is_id else self.size or 1


class Label(Section):
    """The part of `[[tasks]]` that reading needs: the label, and the condition under which it means something."""

    name: str = Field(min_length=1)
    kind: Literal["binary", "duration"]
    label: str
    given: str | None = None
    """Task whose label must be 1 for this label to mean something."""
    scale: PositiveFloat = 1.0
    """duration: factor to seconds."""
    cap: PositiveFloat | None = None
    """duration: labels above are cut to it, in seconds, and counted. So are negative ones, to 0."""
    nulls: Literal["fail", "mask"] = "fail"
    """mask: a row without this label teaches this task, and those it is `given` to, nothing."""

    @model_validator(mode="after")
    def _only_durations_scale(self) -> Label:
        reject_foreign_keys(self, f"task '{self.name}'", {"scale": ("duration",), "cap": ("duration",)})
        return self


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or nothing where no candidate is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def unique(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {kind} are named '{name}'")


@dataclass(frozen=True)
class Schema:
    """Everything reading needs to know, checked against itself.

    Raises:
        ValueError: names the key and what is allowed.
    """

    data: DataSection
    tables: tuple[TableIds, ...]
    features: tuple[Feature, ...]
    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("the recipe has no [[features]]")
        unique("tables", [t.name for t in self.tables])
        unique("features", [f.name for f in self.features])
        unique("tasks", [t.name for t in self.labels])
        label_columns = {label.label for label in self.labels}
        names = [table.name for table in self.tables]
        for feature in self.features:
            if feature.table is not None and feature.table not in names:
                raise ValueError(f"feature '{feature.name}': no table '{feature.table}'{nearest(feature.table, names)}")
            if feature.column in label_columns:
                raise ValueError(f"feature '{feature.name}' reads '{feature.column}', which is a task's label: it would leak")
        for feature in self.features:
            if feature.pooling == "attention":
                self.target(feature)
        used = {feature.table for feature in self.features}
        for name in names:
            if name not in used:
                raise ValueError(f"table '{name}' is used by no feature")
        for label in self.labels:
            self.ancestors(label)

    def ancestors(self, label: Label) -> list[int]:
        """Positions of the tasks whose labels must be 1 for this one to mean something, nearest first."""
        position = {task.name: i for i, task in enumerate(self.labels)}
        found: list[int] = []
        while label.given is not None:
            if label.given not in position:
                others = position.keys() - {label.name}
                raise ValueError(f"task '{label.name}': given = '{label.given}' is no task{nearest(label.given, others)}")
            parent = self.labels[position[label.given]]
            if parent.kind != "binary":
                raise ValueError(f"task '{label.name}': given = '{label.given}' must be a binary task")
            if position[label.given] in found or parent.name == label.name:
                raise ValueError(f"task '{label.name}': given goes in a circle")
            found.append(position[label.given])
            label = parent
        return found

    def target(self, feature: Feature) -> Feature:
        """What a list feature with attention is held against.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        ids = [f for f in self.features if f.kind == "id" and f.table == feature.table]
        if feature.target is not None:
            found = [f for f in ids if f.name == feature.target]
            problem = f"target = '{feature.target}' is no feature of kind 'id' of table '{feature.table}'"
        else:
            found = [f for f in ids if f.side == "item"]
            problem = f"pooling = 'attention' needs a target: table '{feature.table}' has no feature of kind 'id' and side 'item'"
        if not found:
            raise ValueError(f"feature '{feature.name}': {problem}")
        return found[0]

    @property
    def id_features(self) -> list[Feature]:
        """In the order of a Batch's ids: one-id features first, then lists."""
        return [f for f in self.features if f.kind == "id"] + [f for f in self.features if f.kind == "ids"]

    @property
    def dense_features(self) -> list[Feature]:
        return [f for f in self.features if not f.is_id]

    @property
    def id_feature_names(self) -> list[str]:
        """Keys of a Batch's ids, in its order."""
        return [f.name for f in self.id_features]

    @property
    def dense_width(self) -> int:
        return sum(f.width for f in self.features)

    def table(self, name: str | None) -> TableIds:
        return next(table for table in self.tables if table.name == name)

    def feature(self, name: str) -> Feature:
        return next(feature for feature in self.features if feature.name == name)
