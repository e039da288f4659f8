"""The best items for a user, from an export. Needs neither the model nor its ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..datasets.schema import InputError
from ..embeddings.index import search_index
from ..embeddings.vectors import find_vector

FACTS = "export.json"


def search(index: Path, user: str, k: int) -> list[tuple[int | str, float]]:
    """The k best items of one user of an export: (item id, score), best first.

    Raises:
        InputError: no export there, or an unknown user.
    """
    try:
        facts: dict[str, Any] = json.loads((index / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: no export there (no {FACTS}); make one with: triptych export --run RUN --out {index}") from error
    return search_index(index, find_vector(index / "users", facts["user"], user), k)
