"""A suggestion as the text of a recipe: TOML with the reasons as comments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from .features import FeatureGuess, TableGuess, safe_name
from .profile import Profile
from .suggest import Suggestion
from .suspects import Suspect
from .tasks import TaskGuess

_WIDTH = 138
_SIDES = {
    "user": "The user.",
    "item": "The item, as the catalogue has it.",
    "context": "The impression.",
}
_PREDICT = {"duration": ('predict = "median"  # has the smaller absolute error; "mean" has the right sum',)}
_STEPS = 160
"""Batches of an epoch on one rank, about, where the log is small."""


def recipe_text(suggestion: Suggestion, train: Profile, name: str, data: Mapping[str, str]) -> str:
    """The recipe.

    Args:
        data: root, train, and where there are such valid, test and items, as `[data]` has them.
    """
    tables, table_names = _tables(suggestion)
    task_names = _task_names(suggestion.tasks)
    parts = [
        _head(suggestion, name, data),
        _data(suggestion, train, data),
        _tables_text(tables),
        _left_out(suggestion.suspects),
        _features(suggestion, table_names),
        _tasks(suggestion, task_names),
        _rest(suggestion, train),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_value(part) for part in value) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    return repr(value)


def _keys(keys: Mapping[str, object]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in keys.items() if value is not None]


def comment(text: str) -> str:
    """`# text` in lines of bounded width, whatever characters a name holds."""
    lines, line = [], "#"
    for word in re.sub(r"[\x00-\x1f\x7f]+", " ", text).split(" "):
        if len(line) + len(word) >= _WIDTH and line != "#":
            lines.append(line)
            line = "#"
        line += " " + word
    return "\n".join([*lines, line])


def _head(suggestion: Suggestion, name: str, data: Mapping[str, str]) -> str:
    start = f"{name}: a recipe to start from, made by triptych inspect. Read the reasons"
    if suggestion.missing:
        lines = [comment(f"{start}. It cannot train yet: {suggestion.missing}."), ""]
    else:
        lines = [comment(f"{start}, then"), "#", "#   triptych train --recipe THIS_FILE --run runs/first --ranks 2", ""]
    for split, reason in suggestion.unfit.items():
        lines.append(comment(f"{data[split]} is left out: {reason}."))
    return "\n".join([*lines, f"name = {_value(name)}"])


def _data(suggestion: Suggestion, train: Profile, data: Mapping[str, str]) -> str:
    roles = suggestion.roles
    kept = {key: data[key] for key in ("root", "train", *suggestion.splits)}
    batch = 1 << (max(1, train.rows // _STEPS).bit_length() - 1)
    keys = {
        **kept,
        "scenario": roles.scenario,
        "group": roles.user if _is_known(roles.user, train) else None,
        "time": roles.time,
        "batch_size": min(4096, max(64, batch)),
    }
    lines = ["[data]", *_keys(keys)]
    if "valid" not in data:
        lines.append(comment("valid: rows of a later time, to judge by, are not here; without them training reports no metrics."))
    return "\n".join(lines)


def _is_known(name: str | None, train: Profile) -> bool:
    """The column is there and has no nulls: a group, and what a vector is exported for, needs an id."""
    return name is not None and train.columns[name].nulls == 0


def _tables(suggestion: Suggestion) -> tuple[dict[str, TableGuess], dict[str, str]]:
    """Tables by their name in the recipe, and that name for each feature."""
    taken: set[str] = set()
    by_column: dict[str, str] = {}
    for table in suggestion.tables.values():
        if table.column not in by_column:
            by_column[table.column] = safe_name(table.column, taken)
    tables = {by_column[table.column]: table for table in suggestion.tables.values()}
    return tables, {feature: by_column[table.column] for feature, table in suggestion.tables.items()}


def _tables_text(tables: Mapping[str, TableGuess]) -> str:
    parts = [
        comment(
            "Ids are hashed: a table has at least twice as many rows as there are values, and for few values enough to keep them apart."
        )
    ]
    for name, table in tables.items():
        shared = f"  # {', '.join(table.shared_with)}: the same ids" if table.shared_with else ""
        lines = ["[[tables]]", f"name = {_value(name)}{comment_safe(shared)}"]
        parts.append("\n".join([*lines, f"rows = {table.rows}", f"dim = {table.dim}"]))
    return "\n".join(parts) if tables else ""


def comment_safe(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text)


def _left_out(suspects: list[Suspect]) -> str:
    if not suspects:
        return ""
    lines = ["# Left out. Leaks of a label, and what sounds like one, come back only if you know the value before the impression."]
    return "\n".join([*lines, *(comment(f"  {suspect.column} {suspect.reason}.") for suspect in suspects)])


def _features(suggestion: Suggestion, table_names: Mapping[str, str]) -> str:
    taken: set[str] = set()
    parts: list[str] = []
    side = None
    for feature in suggestion.features:
        if feature.side != side:
            side = feature.side
            parts.append(f"{chr(10) if parts else ''}# {_SIDES[side]}")
        parts.append(_feature(feature, taken, table_names.get(feature.column + feature.suffix)))
    return "\n".join(parts)


def _feature(feature: FeatureGuess, taken: set[str], table: str | None) -> str:
    name = safe_name(feature.column + feature.suffix, taken)
    column = feature.column if feature.column != name else None
    side = feature.side if feature.side != "context" else None
    keys = {"name": name, "column": column, "kind": feature.keys["kind"], "table": table, "side": side} | feature.keys
    return "\n".join([_headed("[[features]]", feature.why), *_keys(keys)])


def _headed(header: str, why: str) -> str:
    """`header  # why` on one line, or on more where it is long."""
    text = comment(why)
    return f"{header}  {text}" if "\n" not in text and len(header) + len(text) + 2 <= _WIDTH else f"{text}\n{header}"


def _task_names(tasks: list[TaskGuess]) -> dict[str, str]:
    taken = {"retrieval"}
    return {task.label: safe_name(task.label, taken) for task in tasks}


def _tasks(suggestion: Suggestion, task_names: Mapping[str, str]) -> str:
    parts = []
    for task in suggestion.tasks:
        given = task_names[task.given] if task.given else None
        keys = {
            "name": task_names[task.label],
            "kind": task.kind,
            "label": task.label,
            "given": given,
            "scale": task.scale,
            "cap": task.cap,
            "nulls": task.nulls,
        }
        parts.append("\n".join([_headed("[[tasks]]", task.why), *_keys(keys), *_PREDICT.get(task.kind, ())]))
    if suggestion.other_labels:
        parts.append("\n".join(["# Could be tasks too, and are no features:", *(comment("  " + line) for line in suggestion.other_labels)]))
    return "\n".join(parts)


def _rest(suggestion: Suggestion, train: Profile) -> str:
    roles = suggestion.roles
    parts = ['[model]\nsharing = "mmoe"\nexperts = 4\nexpert_layers = [128, 64]\ntower_layers = [32]']
    has_click = any(task.kind == "binary" for task in suggestion.tasks)
    columns = {feature.column for feature in suggestion.features}
    if has_click and all(name in columns and _is_known(name, train) for name in (roles.user, roles.item)):
        taken: set[str] = set()
        named = {f.column + f.suffix: safe_name(f.column + f.suffix, taken) for f in suggestion.features}
        assert roles.user is not None and roles.item is not None
        parts.append("\n".join(["[retrieval]", *_keys({"user": named[roles.user], "item": named[roles.item], "dim": 32})]))
    if roles.user or roles.item:
        parts.append("[train]\n# A second epoch often learns users and items by heart.\nepochs = 1\nlr = 0.002\nembedding_lr = 0.05")
    else:
        patience = "\npatience = 2" if "valid" in suggestion.splits else ""
        parts.append(f"[train]\nepochs = 4{patience}\nlr = 0.001\nembedding_lr = 0.05")
    return "\n\n".join(parts)
