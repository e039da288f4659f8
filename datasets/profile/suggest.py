"""Profiles of the splits -> everything a recipe needs, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .columns import ColumnProfile, common_kind
from .features import FeatureGuess, TableGuess, guess_features, shares_ids, table_of
from .profile import Profile
from .roles import Roles, Sample, find_roles
from .suspects import Suspect, find_suspects, unreadable
from .tasks import TaskGuess, correlations, guess_tasks


@dataclass
class Suggestion:
    """A recipe to start from. Tables are named by column, see `TableGuess`."""

    roles: Roles
    tasks: list[TaskGuess]
    features: list[FeatureGuess]
    tables: dict[str, TableGuess]
    """By the name of each feature's column, with its suffix; shared tables occur more than once."""
    suspects: list[Suspect]
    other_labels: list[str]
    """Outcomes that are no task: name and why."""
    correlations: dict[tuple[str, str], float]
    splits: list[str]
    """Of valid, test and items those that fit."""
    unfit: dict[str, str] = field(default_factory=dict)
    """The others, and why."""

    @property
    def missing(self) -> str | None:
        """What must be added before a recipe of this can train; None where nothing is."""
        parts = []
        if not self.tasks:
            parts.append("no column looks like a label: add a [[tasks]] part with name, kind (binary or duration) and label")
        if not self.tables:
            parts.append(
                "no column looks like an id: add a [[tables]] part with name, rows and dim, and a feature of kind id that reads it"
            )
        return "; ".join(parts) or None


def suggest(train: Profile, splits: Mapping[str, Profile]) -> Suggestion:
    """A recipe from the profiles of `train` and, where there are such, of `valid`, `test` and `items`."""
    sample = Sample.of(train)
    roles = find_roles(train, sample, splits.get("items"))
    suspects = find_suspects(train, roles, sample)
    dropped = {suspect.column for suspect in suspects}
    tasks, other_labels = guess_tasks(train, roles, sample, dropped)
    tasks = [_masked(task, train, [splits[name] for name in splits if name != "items"]) for task in tasks]
    found = Suggestion(roles, tasks, [], {}, suspects, other_labels, correlations(roles, sample), [])
    _check_splits(found, train, splits)
    _keep_to_catalogue(roles, splits if "items" in found.splits else {})
    logs = {name: splits[name] for name in found.splits}
    for name, column in train.columns.items():
        if name in dropped or name == roles.time or name in roles.outcomes or name not in sample.codes:
            continue
        parts = [logs[split].columns[name] for split in logs if name in logs[split].columns]
        unfit = next((reason for part in parts if (reason := _unfit_part(column, part))), None)
        if unfit:
            found.suspects.append(Suspect(name, "unreadable", unfit))
        else:
            found.features += guess_features(column, roles, sample, parts)
    found.features.sort(key=lambda feature: _place(feature, roles))
    found.tables = _tables(found.features, train, roles)
    return found


def _masked(task: TaskGuess, train: Profile, others: Sequence[Profile]) -> TaskGuess:
    """Nulls of any split ask for the mask."""
    nulls = train.columns[task.label].nulls
    elsewhere = sum(profile.columns[task.label].nulls for profile in others if task.label in profile.columns)
    if not nulls and not elsewhere:
        return task
    count = f"{nulls:,} nulls" if nulls else f"{elsewhere:,} nulls in other splits"
    return replace(task, nulls="mask", why=f"{task.why}; {count}: those rows teach this task nothing")


def _place(feature: FeatureGuess, roles: Roles) -> tuple[int, bool]:
    """User before item before context, and of each side its id first."""
    return ("user", "item", "context").index(feature.side), feature.column not in (roles.user, roles.item)


def _check_splits(found: Suggestion, train: Profile, splits: Mapping[str, Profile]) -> None:
    used = [name for name in train.columns if name not in {suspect.column for suspect in found.suspects}]
    for split, profile in splits.items():
        reason = _unfit_catalogue(profile, found.roles) if split == "items" else _unfit_log(profile, train, used, found.tasks)
        if reason is None:
            found.splits.append(split)
        else:
            found.unfit[split] = reason


def _unfit_catalogue(items: Profile, roles: Roles) -> str | None:
    if roles.item is None:
        return "no column was recognised as the item's id"
    if roles.item not in items.columns:
        return f"it has no column {roles.item}"
    return f"{roles.item} has nulls there" if items.columns[roles.item].nulls else None


def _unfit_log(profile: Profile, train: Profile, used: list[str], tasks: list[TaskGuess]) -> str | None:
    for name in used:
        if name not in profile.columns:
            return f"it has no column {name}"
        if not _alike(profile.columns[name], train.columns[name]):
            return f"its column {name} is {profile.columns[name].type}, but {train.columns[name].type} in train"
    for task in tasks:
        label = profile.columns[task.label]
        if label.nan or label.infinite:
            return f"its label {task.label} holds {label.nan} NaN and {label.infinite} infinite values"
        if task.kind == "binary" and not (label.whole and label.min in (0, 1) and label.max in (0, 1)):
            return f"its label {task.label} is not always 0 or 1"
        if task.kind == "duration" and (label.min is None or label.min < 0):
            return f"its label {task.label} is negative"
    return None


def _alike(a: ColumnProfile, b: ColumnProfile) -> bool:
    return common_kind({a.kind, b.kind}) is not None and common_kind({a.element, b.element}) is not None


def _unfit_part(column: ColumnProfile, part: ColumnProfile) -> str | None:
    """Why the column of another split spoils the feature."""
    reason = unreadable(part)
    if reason is None and column.is_list and column.element == "number" and part.length_max != column.length_max:
        reason = f"holds lists of {part.length_max} numbers"
    if reason is None and column.holds_whole_numbers and part.values and not part.holds_whole_numbers:
        reason = "holds fractions, or numbers beyond 2^63"
    return f"in another split {reason}" if reason else None


def _keep_to_catalogue(roles: Roles, splits: Mapping[str, Profile]) -> None:
    """The item's side is what the catalogue has; other attributes of the item are known at the impression alone."""
    items = splits.get("items")
    if items is None:
        return
    for name, side in roles.sides.items():
        if side == "item" and name not in items.columns:
            roles.sides[name] = "context"
            roles.why[name] = "an attribute of the item, but not in the catalogue"


def _tables(features: list[FeatureGuess], train: Profile, roles: Roles) -> dict[str, TableGuess]:
    """A table for each id feature; columns of the user's or the item's ids share one."""
    with_table = [f for f in features if f.keys["kind"] in ("id", "ids")]
    owner = {f.column + f.suffix: f.column + f.suffix for f in with_table}
    for feature in with_table:
        for side, entity in (("user", roles.user), ("item", roles.item)):
            if entity is None or feature.suffix or feature.column in (roles.user, roles.item) or owner[feature.column] != feature.column:
                continue
            if shares_ids(train.columns[feature.column], train.columns[entity], side):
                owner[feature.column] = entity
    tables = {}
    for feature in with_table:
        name = feature.column + feature.suffix
        if "buckets" in feature.keys:
            count = len(feature.keys["buckets"]) + 1
            tables[name] = TableGuess(name, count, max(16, 1 << (count - 1).bit_length()), 8)
        elif owner[name] == name:
            others = [train.columns[other] for other, of in owner.items() if of == name and other != name]
            universe = max([train.columns[name].distinct, *(other.distinct for other in others)])
            tables[name] = table_of(train.columns[name], others, universe)
    return {name: tables[of] for name, of in owner.items()}
