"""triptych inspect: what is in parquet files, what looks like a leak, and a recipe to start from."""

from __future__ import annotations

import io
import json as jsonlib
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..datasets.profile.columns import ColumnProfile
from ..datasets.profile.profile import SAMPLE_ROWS, Profile, profile_files
from ..datasets.profile.recipe_text import recipe_text
from ..datasets.profile.suggest import Suggestion, suggest
from ..datasets.schema import InputError
from ..datasets.storage.access import find_files
from .console import SECONDS_BETWEEN_LINES

_SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
    "items": ("items", "item", "catalogue", "catalog"),
}
_PIPED_WIDTH, _WIDE = 180, 140
_LEAST_SECONDS = 6e8  # since 1970; smaller numbers count from elsewhere
_SIGNS = re.compile(r"[*?\[]")
_OPTIONS = re.compile(r"(.*?)(\?[\w.-]+=[^?]*)?", re.DOTALL)


def inspect(path: str, out: Path | None, json: Path | None) -> None:
    """Profile PATH, print the profile, and write or print the recipe.

    Args:
        path: a parquet file, a folder, or a glob. A folder with train*, valid*, test*, items* inside is taken as splits.
        out: file for the recipe; printed without it.
        json: file for the profile.
    Raises:
        InputError: nothing there, or files that cannot be read together.
    """
    data = locate(path)
    profiles = _profiles(data)
    train = profiles.pop("train")
    found = suggest(train, profiles)
    text = recipe_text(found, train, _name(data["root"]), data)
    _print(train, found, as_comments=out is None)
    if json is not None:
        _write(json, jsonlib.dumps(_strict(report(train, found)), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if out is not None:
        _write(out, text)
        train_it = f"next: triptych train --recipe {out} --run runs/first --ranks 2"
        print(f"{out}: the recipe; {f'it cannot train yet: {found.missing}' if found.missing else train_it}")
    else:
        print(text, end="")


def locate(path: str) -> dict[str, str]:
    """`root`, `train` and, where there are such, `valid`, `test` and `items`, as `[data]` has them.

    Raises:
        InputError: nothing there.
    """
    place, options = _without_options(path)
    place = place.rstrip("/") or "/"
    splits = {} if _is_glob(place) or place.endswith(".parquet") else _splits_in(place, options)
    if "train" in splits:
        return {"root": place + options, **splits}
    root, _, last = place.rpartition("/")
    while _is_glob(root):
        root, _, parent = root.rpartition("/")
        last = f"{parent}/{last}"
    root = (root or ("/" if place.startswith("/") else ".")) + options
    find_files(root, last)
    return {"root": root, "train": last}


def _is_glob(place: str) -> bool:
    return bool(_SIGNS.search(place)) and not os.path.exists(place)


def _without_options(path: str) -> tuple[str, str]:
    """A URL and its `?key=value` options; a local name has none."""
    place, options = _OPTIONS.fullmatch(path).groups("") if "://" in path else (path, "")  # type: ignore[union-attr]
    return place, options


def _splits_in(folder: str, options: str) -> dict[str, str]:
    """Files and folders of a folder that are named like splits."""
    try:
        files = find_files(folder + options, "*")
    except InputError:
        return {}
    prefixes = (folder + "/", os.path.normpath(folder) + "/", folder.removeprefix("file://") + "/")
    below = [next((file.removeprefix(prefix) for prefix in prefixes if file.startswith(prefix)), file) for file in files]
    names = {name.removesuffix(options).split("/")[0] for name in below if name.removesuffix(options).endswith(".parquet")}
    found: dict[str, str] = {}
    for split, stems in _SPLITS.items():
        for stem in stems:
            parts = [name for name in names if re.fullmatch(stem + r"[-_.0-9].*\.parquet", name)]
            pattern = next((name for name in (f"{stem}.parquet", stem) if name in names), f"{stem}[-_.0-9]*.parquet" if parts else None)
            if pattern is not None:
                found.setdefault(split, pattern)
    return found


def _profiles(data: Mapping[str, str]) -> dict[str, Profile]:
    """A profile of each split; rows are sampled of train alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        return {split: _profile(data, split, bar) for split in _SPLITS if split in data}


def _profile(data: Mapping[str, str], split: str, bar: Progress) -> Profile:
    task, said = bar.add_task(split, total=None), time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        bar.update(task, completed=done, total=total)
        if bar.disable and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"inspect {split} {done:,}/{total:,} rows", file=sys.stderr, flush=True)

    files = find_files(data["root"], data[split])
    return profile_files(files, sample_rows=SAMPLE_ROWS if split == "train" else 0, progress=progress)


def _name(root: str) -> str:
    folder = root if "://" in root else os.path.abspath(root)
    return _without_options(folder)[0].rstrip("/").rsplit("/", 1)[-1] or "log"


def report(train: Profile, found: Suggestion) -> dict[str, Any]:
    """The profile with roles, suspects and label facts, as `--json` has it."""
    roles = found.roles
    facts = train.as_json()
    facts["roles"] = {"user": roles.user, "item": roles.item, "time": roles.time, "scenario": roles.scenario, "sides": roles.sides}
    facts["time_range"] = _period(train, found)
    facts["labels"] = {name: {"rate": train.columns[name].mean} for name in roles.labels}
    facts["durations"] = {name: {"mean": train.columns[name].mean} for name in roles.durations}
    facts["label_correlations"] = [{"a": a, "b": b, "correlation": value} for (a, b), value in found.correlations.items()]
    facts["suspects"] = [vars(suspect) for suspect in found.suspects]
    return facts


def _strict(value: Any) -> Any:
    """null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Beside first, then renamed."""
    half = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(text, encoding="utf-8")
        os.replace(half, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from error


def _print(train: Profile, found: Suggestion, *, as_comments: bool) -> None:
    """The profile as tables; piped, as plain lines, which may be comments of the recipe that follows."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=_PIPED_WIDTH, file=io.StringIO())
    files = f"{train.files} files, {train.row_groups} row groups, {train.bytes / 1e6:,.1f} MB"
    period = ", " + " to ".join(_period(train, found)) + " UTC" if _period(train, found) else ""
    console.print(f"{train.rows:,} rows, {len(train.columns)} columns, {files}{period}", highlight=False)
    console.print(_columns_table(train, found, narrow=console.width < _WIDE))
    if found.correlations:
        console.print(_labels_table(train, found))
    if found.suspects:
        table = _table("Left out of the features", "column", "suspected as", "because it")
        for suspect in found.suspects:
            table.add_row(*map(escape, (suspect.column, suspect.kind, suspect.reason)))
        console.print(table)
    if isinstance(console.file, io.StringIO):
        mark = "# " if as_comments else ""
        print("\n".join((mark + line).rstrip() for line in console.file.getvalue().splitlines()))


def _table(title: str, *headers: str) -> Table:
    return Table(*headers, title=title, title_justify="left", box=None)


def _period(train: Profile, found: Suggestion) -> list[str]:
    """First and last moment of the time column, to the minute; nothing without one."""
    column = train.columns[found.roles.time] if found.roles.time else None
    if column is None or column.min is None or column.max is None or column.max < _LEAST_SECONDS:
        return []
    # A number since 1970 has as many digits as its unit asks for.
    sizes = ((1e11, 1e-3), (1e14, 1), (1e17, 1e3), (math.inf, 1e6))
    per_ms = 1 if column.kind == "moment" else next(unit for size, unit in sizes if column.max < size)
    return [str(np.datetime64(int(value / per_ms), "ms"))[:16].replace("T", " ") for value in (column.min, column.max)]


def _columns_table(train: Profile, found: Suggestion, *, narrow: bool) -> Table:
    headers = ("column", "type", "role", "nulls", "distinct", "top 1/10/100", "min", "mean", "max", "lists: mean/max/empty")
    shown = [0, 2, 3, 4, 5, 6, 8] if narrow else list(range(len(headers)))
    table = _table("Columns", *(headers[i] for i in shown))
    for column in table.columns:
        column.no_wrap = True
    for name, profile in train.columns.items():
        facts = [escape(name), escape(profile.type), _role(name, found), *_facts(profile)]
        table.add_row(*(facts[i] for i in shown))
    return table


def _role(name: str, found: Suggestion) -> str:
    roles = found.roles
    if any(suspect.column == name for suspect in found.suspects):
        return "left out"
    special: dict[str | None, str] = {roles.user: "user id", roles.item: "item id", roles.time: "time", roles.scenario: "scenario"}
    special.update(dict.fromkeys(roles.labels, "label") | dict.fromkeys(roles.durations, "duration"))
    return special.get(name) or roles.sides.get(name, "")


def _facts(column: ColumnProfile) -> list[str]:
    nulls = f"{column.nulls / max(1, column.rows):.1%}" if column.nulls else ""
    if column.nan or column.infinite:
        nulls = f"{nulls} {column.nan} NaN {column.infinite} inf".strip()
    distinct = f"{'' if column.distinct_is_exact else '~'}{column.distinct:,}" if column.values else ""
    heads = "/".join(f"{share:.0%}" for share in column.head_share.values())
    numbers = ["" if v is None else str(v) if isinstance(v, int) else f"{v:.6g}" for v in (column.min, column.mean, column.max)]
    lists = (
        f"{column.length_mean:.1f}/{column.length_max}/{column.empty_lists}" if column.is_list and column.length_mean is not None else ""
    )
    return [nulls, distinct, heads, *numbers, lists]


def _labels_table(train: Profile, found: Suggestion) -> Table:
    """Rate of each label, mean of each duration, and how they go together."""
    outcomes = found.roles.outcomes
    table = _table("Labels and their correlations", "label", "mean", *map(escape, outcomes))
    for a in outcomes:
        pairs = [found.correlations.get((a, b), found.correlations.get((b, a), 1.0)) for b in outcomes]
        table.add_row(escape(a), f"{train.columns[a].mean:.6g}", *(f"{value:.2f}" for value in pairs))
    return table
