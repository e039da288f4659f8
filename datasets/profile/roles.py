"""What each column is for: the user, the item, the time, labels, durations, and the side that a feature belongs to.

Names propose and the data disposes: a column named like a label that has one value for each user is an attribute of the user.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import names
from .columns import LARGEST, ColumnProfile
from .measures import Key, values_of
from .profile import Profile

MOST_DISAGREEMENT = 0.1
"""Of two rows with the same key, against any two rows: below this, a column is an attribute of the key."""
_EPOCHS = ((6e8, 4.2e9), (6e11, 4.2e12), (6e14, 4.2e15), (6e17, 4.2e18))
"""Seconds, milliseconds, microseconds, nanoseconds since 1970, for the years from 1989 to 2103."""


@dataclass
class Roles:
    """Columns by role; `why` says of a column what spoke for it, in a few words."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    scenario: str | None = None
    labels: list[str] = field(default_factory=list)
    durations: list[str] = field(default_factory=list)
    sides: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[str]:
        return self.labels + self.durations


@dataclass
class Sample:
    """The sampled rows, a column at a time: codes int64 [N], numbers float64 [N]."""

    codes: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]

    @property
    def rows(self) -> int:
        return len(next(iter(self.codes.values()), ()))

    @classmethod
    def of(cls, profile: Profile) -> Sample:
        pairs = {name: values_of(profile.sample.column(name)) for name in profile.sample.column_names}
        return cls({name: codes for name, (codes, _) in pairs.items()}, {name: numbers for name, (_, numbers) in pairs.items()})


def find_roles(profile: Profile, sample: Sample, catalogue: Profile | None = None) -> Roles:
    """Roles of the columns of a log.

    Args:
        catalogue: profile of the items' file; a column that is unique there and stands in the log too is the item.
    """
    roles = Roles()
    roles.user = _entity(profile, "user")
    roles.item = (_key_of(catalogue, profile) if catalogue else None) or _entity(profile, "item")
    _find_sides(roles, profile, sample)
    roles.time = _time(profile, roles)
    for name, column in profile.columns.items():
        if roles.sides.get(name) == "context" and name != roles.time:
            if is_binary(column) and names.is_action(name):
                roles.labels.append(name)
            elif _is_duration(column):
                roles.durations.append(name)
        elif name != roles.time and name in roles.sides and is_binary(column) and names.is_action(name):
            roles.why[name] = f"one value for each {roles.sides[name]}: an attribute, no label"
    roles.scenario = _scenario(profile, roles)
    return roles


def _is_id_like(column: ColumnProfile) -> bool:
    return column.kind in ("integer", "text") or (column.kind == "number" and column.holds_whole_numbers)


def _entity(profile: Profile, side: str) -> str | None:
    """The column that names the user, or the item: by its name, with at least ten values, in more than one row each on average."""
    found = []
    for name, column in profile.columns.items():
        score = names.entity_score(name, side)
        if score is not None and _is_id_like(column) and 10 <= column.distinct <= column.rows / 1.05:
            found.append((score, name))
    return min(found)[1] if found else None


def _key_of(catalogue: Profile, profile: Profile) -> str | None:
    """The first column that is unique in the catalogue, and an id in both."""
    for name, column in catalogue.columns.items():
        unique = _is_id_like(column) and column.nulls == 0 and column.distinct >= 0.97 * column.rows
        named = names.entity_score(name, "item") is not None or names.is_id(name)
        if unique and named and name in profile.columns and _is_id_like(profile.columns[name]):
            return name
    return None


def _find_sides(roles: Roles, profile: Profile, sample: Sample) -> None:
    keys = {side: Key(sample.codes[name]) for side, name in (("user", roles.user), ("item", roles.item)) if name}
    for name in profile.columns:
        if name not in sample.codes:
            continue
        if name in (roles.user, roles.item):
            roles.sides[name] = "user" if name == roles.user else "item"
            continue
        found = {side: key.disagreement(sample.codes[name]) for side, key in keys.items()}
        known = {side: share for side, share in found.items() if share is not None and share <= MOST_DISAGREEMENT}
        roles.sides[name] = min(known, key=lambda side: known[side]) if known else "context"
        if known:
            roles.why[name] = f"the same in all rows of {'a user' if roles.sides[name] == 'user' else 'an item'}"


def is_moment(column: ColumnProfile) -> bool:
    """A date, a timestamp, or a number that is one by its name and its size."""
    if column.kind == "moment":
        return True
    if column.kind not in ("integer", "number") or names.time_score(column.name) is None or column.min is None or column.max is None:
        return False
    if any(low <= column.min and column.max <= high for low, high in _EPOCHS):
        return True
    # A clock of one's own, that began at 0.
    return names.is_only_time(column.name) and column.min >= 0 and 2 * column.distinct > column.rows


def _time(profile: Profile, roles: Roles) -> str | None:
    """The moment of the row: the one with the most values."""
    found = [c for c in profile.columns.values() if c.name and is_moment(c) and roles.sides.get(c.name) == "context" and not c.is_constant]
    best = max(found, key=lambda c: (names.time_score(c.name) or 0, c.distinct), default=None)
    return best.name if best else None


def is_binary(column: ColumnProfile) -> bool:
    """0 and 1, and nothing else but nulls."""
    return column.holds_whole_numbers and column.distinct == 2 and (column.min, column.max) == (0, 1)


def _is_duration(column: ColumnProfile) -> bool:
    return looks_like_duration(column) and column.nan == column.infinite == 0


def looks_like_label(column: ColumnProfile) -> bool:
    """0 and 1, nulls and NaN aside, and named like an action."""
    return column.whole and column.distinct == 2 and (column.min, column.max) == (0, 1) and names.is_action(column.name)


def looks_like_duration(column: ColumnProfile) -> bool:
    """Many numbers from 0 up, nulls and NaN aside, and named like a duration."""
    if not column.is_numeric or column.min is None or column.max is None:
        return False
    return column.distinct > 20 and 0 <= column.min <= column.max <= LARGEST and names.is_duration(column.name)


def _scenario(profile: Profile, roles: Roles) -> str | None:
    """A place in the app: few values, changing from row to row."""
    found = []
    for name, column in profile.columns.items():
        score = names.scenario_score(name)
        free = roles.sides.get(name) == "context" and name not in (*roles.outcomes, roles.time)
        if score is not None and free and (_is_id_like(column) or column.kind == "boolean") and 2 <= column.distinct <= 50:
            found.append((score, name))
    return min(found)[1] if found else None
