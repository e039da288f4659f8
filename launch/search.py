"""The best items for a user, from an export. Needs neither the model nor its ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..datasets.fitted import read_key
from ..datasets.ids import hashed_ids
from ..datasets.schema import InputError
from ..embeddings.index import search_index
from ..embeddings.vectors import find_vector

FACTS = "export.json"


def search(index: Path, user: str, k: int, key_file: Path | None = None) -> list[tuple[int | str, float]]:
    """The k best items of one user of an export: (item id, score), best first.

    Args:
        key_file: the secret that the export's user ids are hashed with; without it `user` is such a hash.

    Raises:
        InputError: no export there, or an unknown user.
    """
    try:
        facts: dict[str, Any] = json.loads((index / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: no export there (no {FACTS}); make one with: triptych export --run RUN --out {index}") from error
    if key_file is not None and not facts.get("user_ids_hashed"):
        raise InputError(f"{index}: its user ids are not hashed; leave --key-file out")
    wanted = user if key_file is None else hashed_ids(pa.array([user]), read_key(str(key_file)))[0].as_py()
    try:
        vector_D = find_vector(index / "users", facts["user"], wanted)
    except InputError as error:
        hint = "; the ids are hashed, give their --key-file" if facts.get("user_ids_hashed") and key_file is None else ""
        raise InputError(f"{error}{hint}") from error
    return search_index(index, vector_D, k)
