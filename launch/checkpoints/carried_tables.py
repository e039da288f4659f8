"""Tables of another run's checkpoint -> this run's, under any plan: each id keeps its vector, wherever its row is now."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ...datasets.fitted import UNSEEN_ROW, Fitted, Vocabulary
from ...datasets.schema import Schema
from ...embeddings.dynamic.slots import Geometry
from ...embeddings.sharding import of_table
from ...embeddings.tables import EmbeddingTable
from ..build import Built, table_state
from ..config import Recipe
from ..distributed import Ranks
from ..faults.stages import stage
from .carried_ids import BLOCK_BYTES, carry_ids, parts_sources
from .parts import Part, local_parts
from .reader import Reader


class Described(NamedTuple):
    """What a run's ids mean."""

    recipe: Recipe
    fitted: Fitted


class CarriedTables(NamedTuple):
    """Tables that were loaded, if only in part, the number of all, and why others were not."""

    loaded: list[str]
    total: int
    remarks: list[str]


def carry_tables(built: Built, reader: Reader, then: Described, now: Described, ranks: Ranks) -> CarriedTables:
    """Load the vectors of the ids that both runs' tables have; the others stay as they were initialised. Collective."""
    theirs, ours = ({table.name: table for table in run.recipe.tables} for run in (then, now))
    loaded: list[str] = []
    remarks = [f"table {name}: no longer there" for name in theirs if name not in ours]
    for name, table in ours.items():
        if name not in theirs:
            remarks.append(f"table {name}: new")
        elif reason := why_not(theirs[name], table, then.fitted, now.fitted):
            remarks.append(f"table {name}: not loaded, {reason}")
        else:
            stage(f"loading table {name} of {reader.folder}")
            loaded.append(name)
            remarks += [f"table {name}: {remark}" for remark in _carry_table(built, reader, theirs[name], table, then, now, ranks)]
    if built.dynamic is not None and any(ours[name].ids == "dynamic" for name in loaded):
        reader.copy_into("ids/step", built.dynamic.ids.step)
        built.dynamic.ids.loaded()
    return CarriedTables(loaded, len(ours), remarks)


def why_not(then: EmbeddingTable, now: EmbeddingTable, fitted_then: Fitted, fitted_now: Fitted) -> str | None:
    """Why no row can be an id's that it was before; None if some can."""
    if then.dim != now.dim:
        return f"dim {then.dim} then, {now.dim} now"
    if then.ids != now.ids:
        return f'ids = "{then.ids}" then, "{now.ids}" now'
    if fitted_then.keys.get(then.name) != fitted_now.keys.get(now.name):
        return "its key_file is another; ids have other rows"
    if now.ids == "hash" and then.rows != now.rows:
        return f"{then.rows} rows then, {now.rows} now; a hashed id has another row"
    return None


def _carry_table(
    built: Built, reader: Reader, their: EmbeddingTable, table: EmbeddingTable, then: Described, now: Described, ranks: Ranks
) -> list[str]:
    """Returns what is not as it was. Collective."""
    name = next(n for n in reader.names() if n.startswith("model/") and of_table(n) == table.name)
    parts = [part for n, weight in table_state(built).items() if of_table(n) == table.name for part in local_parts(weight)]
    remarks = _type_remarks(their, table, then, now)
    if table.ids == "vocabulary":
        old, new = then.fitted.vocabularies[table.name], now.fitted.vocabularies[table.name]
        for part in parts:
            move_rows(reader, name, part, vocabulary_sources(old, new, part))
        num_kept = int(np.count_nonzero(old.rows_of(new.code_V) != UNSEEN_ROW))
        if num_kept < max(len(old.code_V), len(new.code_V)):
            remarks.append(
                f"{len(old.code_V)} values then, {len(new.code_V)} now; {num_kept} are in both; new ones begin with row {UNSEEN_ROW}"
            )
        return remarks
    slot_map = built.dynamic.ids.maps[table.name] if built.dynamic is not None and table.ids == "dynamic" else None
    if slot_map is not None and slot_map.geometry != Geometry.of(their.rows):
        moved = carry_ids(reader, table.name, slot_map, ranks)
        for part, source_R in zip(parts, parts_sources(slot_map, moved.source_S, parts, ranks), strict=True):
            move_rows(reader, name, part, source_R)
        return [*remarks, f"{their.rows} rows then, {table.rows} now; {moved.num_placed} of {moved.num_ids} ids have a row"]
    if slot_map is not None:
        for array, shard in slot_map.state().items():
            if (saved := f"ids/{table.name}/{array}") in reader.names():
                reader.copy_into(saved, shard)
    for part in parts:
        reader.read_part(name, Part(part.offsets, part.tensor[: max(0, their.rows - part.offsets[0])]))
    if their.rows != table.rows:
        rest = "the others are initialised" if table.rows > their.rows else "the first of them are loaded"
        remarks.append(f"{their.rows} rows then, {table.rows} now; {rest}")
    return remarks


def _type_remarks(their: EmbeddingTable, table: EmbeddingTable, then: Described, now: Described) -> list[str]:
    remarks = [] if their.dtype == table.dtype else [f"{their.dtype} then, {table.dtype} now; converted"]
    families = [_families(run.recipe.data_schema, run.fitted, table.name) for run in (then, now)]
    for column, family in families[1].items():
        before = families[0].get(column, family)
        if ("strings" in before) != ("strings" in family):
            remarks.append(f"loaded, but column '{column}' held {before} then, {family} now: a number and its text are different ids")
    return remarks


def _families(schema: Schema, fitted: Fitted, table: str) -> dict[str, str]:
    columns = {feature.column for feature in schema.features if feature.table == table}
    return {column: family for column, (family, _) in fitted.types.families.items() if column in columns}


def vocabulary_sources(old: Vocabulary, new: Vocabulary, part: Part) -> torch.Tensor:
    """The old row of each row of a part, int64; -1 for rows without a value. The unseen one's, for values that are new."""
    first, last = part.offsets[0], part.ends[0]
    source_R = torch.full((last - first,), -1)
    if first <= UNSEEN_ROW < last:
        source_R[UNSEEN_ROW - first] = UNSEEN_ROW
    code_K = new.code_V[max(0, first - 1) : last - 1]  # row 1 holds value 0
    begin = max(first, 1) - first
    source_R[begin : begin + len(code_K)] = torch.from_numpy(old.rows_of(code_K))
    return source_R


@torch.no_grad()
def move_rows(reader: Reader, name: str, part: Part, source_R: torch.Tensor) -> None:
    """Fill the rows of a part from rows of a saved table, block by block in the file's order; -1: leave as it is."""
    ordered_R, place_R = source_R.sort()
    num_rows, columns = reader.manifest["tensors"][name]["shape"][0], part.tensor.shape[1]
    block_rows = max(1, BLOCK_BYTES // (columns * part.tensor.element_size()))
    for first in range(0, num_rows, block_rows):
        last = min(first + block_rows, num_rows)
        low, high = torch.searchsorted(ordered_R, torch.tensor([first, last])).tolist()
        if low == high:
            continue
        block = torch.empty(last - first, columns, dtype=part.tensor.dtype)
        reader.read_part(name, Part((first, part.offsets[1]), block))
        place = place_R[low:high].to(part.tensor.device)
        part.tensor[place] = block[ordered_R[low:high] - first].to(part.tensor.device)
