"""Preparing a public log as a stage of a job: torchrun -m triptych.launch.prepare NAME --source DIR --out DIR

The first rank prepares, the others wait.
"""

from . import stack
from .faults.start import start_rank

start_rank()
stack.check()

import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Any  # noqa: E402

import typer  # noqa: E402

from ..datasets.prepare.catalogue import prepare  # noqa: E402
from ..datasets.schema import InputError  # noqa: E402
from .console import ProgressLines, say  # noqa: E402
from .distributed import process_group, run_rank  # noqa: E402
from .writing import write_json  # noqa: E402

FACTS = "prepared.json"


def prepare_once(name: str, source: Path, out: Path) -> None:
    """Prepare a log, unless `out` holds what was prepared from the same files.

    Raises:
        InputError: as of prepare.
    """
    facts = {"log": name, "source": _files(source)}
    before = _facts_of(out)
    if before is not None and before == facts | {"prepared": _prepared(out)}:
        say(f"{out}: was prepared before from the same files")
        return
    (out / FACTS).unlink(missing_ok=True)
    try:
        counts = prepare(name, source, out, ProgressLines(f"prepare {name}", enabled=True))
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from error
    write_json(out / FACTS, facts | {"prepared": _prepared(out)})
    say(f"{out}: {', '.join(f'{kind} {count:,}' for kind, count in counts.items())}")


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _prepared(out: Path) -> dict[str, list[int]]:
    return {name: facts for name, facts in _files(out).items() if name != FACTS}


def _facts_of(out: Path) -> Any:
    try:
        return json.loads((out / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(name: str, source: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    def work() -> None:
        with process_group() as ranks:
            ranks.from_first(lambda: prepare_once(name, source, out))

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
