"""The recipe: a TOML file -> one frozen, checked object. Each section lives beside the code that reads it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError, model_validator

from ..datasets.schema import DataSection, Feature, InputError, Schema, Section, nearest
from ..datasets.storage.access import absolute
from ..embeddings.tables import EmbeddingTable
from ..mmoe.balance import BalanceSection
from ..mmoe.heads import Task
from ..mmoe.model import ModelSection, RetrievalSection
from .checkpoints.saver import CheckpointSection
from .sections import TrainSection
from .writing import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUNDLED = Path(__file__).parent / "recipes"


class Recipe(Section):
    """Everything a run depends on. `--set a.b=c` overrides any key."""

    name: str = "run"
    data: DataSection
    tables: tuple[EmbeddingTable, ...]
    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    model: ModelSection = ModelSection()
    retrieval: RetrievalSection | None = None
    balance: BalanceSection = BalanceSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.tasks:
            raise ValueError("the recipe has no [[tasks]]")
        if not any(feature.is_id for feature in self.features):
            raise ValueError("the recipe has no feature of kind 'id' or 'ids'; without tables there is nothing to shard")
        schema = self.data_schema
        if self.retrieval is not None:
            self.retrieval.check(schema)
        self.train.check_monitor(self.tasks, self.data)
        self.train.table_training.check(self.tables)
        return self

    @property
    def data_schema(self) -> Schema:
        return Schema(self.data, self.tables, self.features, self.tasks)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        source: a TOML file, or the name of a bundled recipe.
        overrides: `a.b=c` each. c is a TOML value or, failing that, a string. Parts of lists go by name: `tasks.ctr.weight=2`.
    Raises:
        InputError: names the file, the key, and what is allowed.
    """
    path = Path(source)
    if not path.is_file() and (BUNDLED / f"{source}.toml").exists():
        path = BUNDLED / f"{source}.toml"
    if not path.is_file():
        bundled = sorted(p.stem for p in BUNDLED.glob("*.toml"))
        raise InputError(f"no such recipe: {source}{nearest(str(source), bundled)}; give a file, or one of {', '.join(bundled)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        apply_override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, values)}") from error
    tables = tuple(
        table.model_copy(update={"key_file": str(Path(table.key_file).expanduser().resolve())}) if table.key_file else table
        for table in recipe.tables
    )
    data, checkpoint = recipe.data.model_copy(update={"root": absolute(recipe.data.root)}), recipe.checkpoint
    if checkpoint.start_from is not None:
        checkpoint = checkpoint.model_copy(update={"start_from": absolute(checkpoint.start_from)})
    return recipe.model_copy(update={"data": data, "tables": tables, "checkpoint": checkpoint})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; reading it back gives the same recipe."""
    write_text(path, tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))


def meaning(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint's numbers mean: ids, features and labels, in their order, and the tables' optimizer, whose state it holds.

    Plans, weights and rates may change between runs. Of features, only what is not the default: keys that came later change nothing.
    """
    tables = recipe.model_dump(mode="json", include={"tables": {"__all__": {"name", "rows", "dim", "ids", "min_count"}}})
    features = {"features": [feature.model_dump(mode="json", exclude_defaults=True) for feature in recipe.features]}
    tasks = recipe.model_dump(mode="json", include={"tasks": {"__all__": {"name", "kind", "label", "given", "scale", "cap", "nulls"}}})
    return tables | features | tasks | {"train.embedding_optimizer": recipe.train.embedding_optimizer}


def difference(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key in which two meanings differ, as the recipe has it, and its values; None if they are alike."""
    for key, value in now.items():
        before = then.get(key, value)
        if not isinstance(value, list):
            if before != value:
                return key, before, value
            continue
        if [part["name"] for part in before] != [part["name"] for part in value]:
            return key, _names(before), _names(value)
        for old, new in zip(before, value, strict=True):
            for part_key in sorted(old.keys() | new.keys()):
                if old.get(part_key) != new.get(part_key):
                    return f"{key}.{new['name']}.{part_key}", old.get(part_key, "the default"), new.get(part_key, "the default")
    return None


def _names(parts: list[dict[str, Any]]) -> str:
    return ", ".join(part["name"] for part in parts)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place.

    Raises:
        InputError: no `=`, or a list part that is not there.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override}: write key=value, as in train.lr=0.001")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    place: Any = values
    for part in parents:
        place = _element(place, part, override) if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise InputError(f"--set {override}: '{part}' is a value, not a section")
    if isinstance(place, list):
        raise InputError(f"--set {override}: '{parents[-1]}' is a list; name one of its parts, as in {parents[-1]}.NAME.{last}")
    place[last] = value


def _element(parts: list[Any], name: str, override: str) -> Any:
    names = [part.get("name") for part in parts if isinstance(part, dict)]
    if name in names:
        return parts[names.index(name)]
    raise InputError(f"--set {override}: nothing is named '{name}'{nearest(name, map(str, names))}")


def explain(error: ValidationError, values: dict[str, Any]) -> str:
    """The first error of a validation as one line: the key as the user wrote it, what is wrong, what is allowed."""
    first = error.errors(include_url=False)[0]
    key = _dotted(first["loc"], values)
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(first["loc"][:-1])
        return f"unknown key '{key}'{nearest(str(first['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    if first["type"] == "missing":
        return f"missing key '{key}'"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # The recipe as a whole and the parts of its lists name themselves.
        return message if not key or isinstance(first["loc"][-1], int) else f"{key}: {message}"
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def _dotted(location: tuple[int | str, ...], values: Any) -> str:
    parts: list[str] = []
    for part in location:
        if isinstance(part, str) and not isinstance(values, dict):
            break  # pydantic's name for one of a key's types
        named = isinstance(part, int) and isinstance(values, list) and part < len(values) and isinstance(values[part], dict)
        parts.append(str(values[part].get("name", part)) if named else str(part))
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            values = None
    return ".".join(parts)


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            candidates = get_args(annotation) or [annotation]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
