"""The command line: triptych, also python -m triptych.launch.cli. Exit codes: 0 done, 2 wrong input, 1 a failure, 130 stopped."""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..datasets.schema import InputError

app = typer.Typer(
    help="Multi-task recommendation on TorchRec: parquet logs in; CTR, CVR and dwell heads, metrics and retrieval vectors out.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

USAGE_ERROR: Any = typer.BadParameter.__base__
"""What the command-line parser raises; typer exports only what derives from it."""
Run = Annotated[str, typer.Option(help="run folder, or a URL of one", show_default=False)]
NumRanks = Annotated[int, typer.Option(min=1, help="processes; one a GPU, or a few on CPU")]
Data = Annotated[str, typer.Option(help="parquet file, folder or glob; or one relative to the recipe's data.root", show_default=False)]


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="folder to write", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="impressions")] = 200_000,
    seed: Annotated[int, typer.Option(help="same seed, same bytes")] = 0,
    users: Annotated[int | None, typer.Option(min=1, help="number of users")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="number of items")] = None,
    tastes: Annotated[int | None, typer.Option(min=1, help="different things that each user likes")] = None,
    history: Annotated[int | None, typer.Option(min=1, help="most items in a user's history")] = None,
) -> None:
    """Write a synthetic world whose true probabilities are known."""
    from ..datasets.world import World, write_world

    given = {"users": users, "items": items, "tastes": tastes, "history": history}
    sizes = {name: value for name, value in given.items() if value is not None}
    try:
        world = World(rows=rows, seed=seed, **sizes)
    except ValueError as error:
        raise InputError(str(error)) from error
    with _progress() as bar:
        task = bar.add_task("synth", total=rows)
        try:
            counts = write_world(world, out, lambda done, total: bar.update(task, completed=done, total=total))
        except OSError as error:
            raise InputError(f"{out}: cannot write there ({error.strerror})") from error
    print(f"{out}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="kuairand, aliccp, aliexpress or census", show_default=False)],
    source: Annotated[Path, typer.Option(help="folder of the raw files, in their official layout", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder to write", show_default=False)],
) -> None:
    """Turn a public log into parquet files that the bundled recipe of its name trains on."""
    from ..datasets.prepare.catalogue import prepare as prepare_log

    with _progress() as bar:
        task = bar.add_task(f"prepare {name}", total=None)
        try:
            counts = prepare_log(name, source, out, lambda done, total: bar.update(task, completed=done, total=total))
        except OSError as error:
            raise InputError(f"{error.filename or out}: {error.strerror or error}") from error
    print(f"{out}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="parquet file, folder or glob, or a URL of one", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="write the recipe here")] = None,
    json: Annotated[Path | None, typer.Option(help="write the profile here")] = None,
) -> None:
    """Profile parquet data in one pass, and suggest a recipe."""
    from .inspect import inspect as profile
    from .writing import check_file

    for file in (out, json):
        if file is not None:
            check_file(file)
    profile(path, out, json)


@app.command()
def plan(
    recipe: Annotated[str, typer.Option(help="recipe file, or the name of a bundled one", show_default=False)],
    ranks: NumRanks = 1,
    nodes: Annotated[int, typer.Option(min=1, help="machines that the ranks are on")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; what this machine has, unless given")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB a rank, of the GPU or on CPU of the host; as here, unless given")] = None,
    host_memory: Annotated[float | None, typer.Option(min=0, help="GiB of host memory a rank, beside a GPU")] = None,
    set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="override a recipe key; repeatable")] = None,
    json: Annotated[Path | None, typer.Option(help="write the plan here too")] = None,
) -> None:
    """Where each table goes and what it takes of each rank, before anything runs. Needs no data and no GPU."""
    from . import stack

    stack.check()
    from .config import load_recipe
    from .plan import machine_like
    from .plan import plan as show_plan
    from .writing import check_file

    if json is not None:
        check_file(json)
    show_plan(load_recipe(recipe, set or []), machine_like(ranks, nodes, device, memory, host_memory), json)


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="recipe file, or the name of a bundled one", show_default=False)],
    run: Run,
    ranks: NumRanks = 1,
    set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="override a recipe key; repeatable")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False,
    restarts: Annotated[int, typer.Option(min=0, help="start all ranks again, from the last checkpoint, so often if one fails")] = 0,
) -> None:
    """Train a recipe on this machine. On a cluster: torchx run -s SCHEDULER launch/component.py:train ..."""
    from . import stack

    stack.check()
    from ..embeddings.memory import this_machine
    from .build import plan_of
    from .checkpoints.start_from import checkpoint_to_start_from
    from .config import load_recipe, save_recipe
    from .distributed import device_type, quiet_the_stack
    from .inference import check_data
    from .nodes.mirror import located
    from .run_folder import claim, has_checkpoint

    resolved = load_recipe(recipe, set or [])
    quiet_the_stack()
    plan_of(resolved, this_machine(device_type(), ranks, ranks))
    folder, at_url = located(run)
    if not (resume and has_checkpoint(folder, at_url)):
        checkpoint_to_start_from(resolved)
    check_data(resolved, rows=False)  # the first rank reads rows, where the data is near
    claim(folder, resume=resume, at_url=at_url)
    # Not into the run folder yet: a resume that is refused must leave its recipe alone.
    with tempfile.TemporaryDirectory() as scratch:
        handed_over = Path(scratch) / "recipe.toml"
        save_recipe(resolved, handed_over)
        _launch("train", {"recipe": handed_over, "run": run, "resume": resume}, ranks, folder, restarts)


@app.command()
def evaluate(
    run: Run,
    data: Data,
    json: Annotated[str | None, typer.Option(help="write the metrics here too: a file, or a URL of one")] = None,
    ranks: NumRanks = 1,
) -> None:
    """Metrics of a run on rows with labels."""
    folder = _check_run(run)
    from .nodes.remote import check_output

    if json is not None:
        check_output(json)
    _launch("evaluate", {"run": run, "data": data, "json": json}, ranks, folder)


@app.command()
def predict(
    run: Run,
    data: Data,
    out: Annotated[str, typer.Option(help="parquet file to write, or a URL of one", show_default=False)],
    ranks: NumRanks = 1,
) -> None:
    """Predictions in input row order, one column a task."""
    folder = _check_run(run)
    from .nodes.remote import check_output

    check_output(out)
    _launch("predict", {"run": run, "data": data, "out": out}, ranks, folder)


@app.command()
def export(
    run: Run, out: Annotated[str, typer.Option(help="folder to write, or a URL of one", show_default=False)], ranks: NumRanks = 1
) -> None:
    """User and item vectors, and an index over the items."""
    folder = _check_run(run)
    from .nodes.remote import check_folder, check_output, is_remote, local_path
    from .search import FACTS

    if is_remote(out):
        check_folder(out, FACTS)
        check_output(out)
    elif local_path(out).is_file():
        raise InputError(f"{out} is a file; export writes a folder")
    _launch("export", {"run": run, "out": out}, ranks, folder)


@app.command()
def search(
    index: Annotated[Path, typer.Option(help="folder of an export", show_default=False)],
    user: Annotated[str, typer.Option(help="user id", show_default=False)],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="number of items")] = 10,
    json: Annotated[bool, typer.Option("--json", help="one JSON line instead of a table")] = False,
    key_file: Annotated[Path | None, typer.Option(help="secret of the user table, where the export holds hashed ids")] = None,
) -> None:
    """The k items whose vectors have the largest inner product with a user's."""
    from .search import search as best_items

    found = best_items(index, user, k, key_file)
    if json:
        print(jsonlib.dumps([{"item": item, "score": score} for item, score in found]))
        return
    table = Table("rank", "item", "score", title=f"user {user}", title_justify="left")
    for rank, (item, score) in enumerate(found, 1):
        table.add_row(str(rank), str(item), f"{score:.4f}")
    Console().print(table)


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="folder for the world, the run and the vectors")] = Path("runs/demo"),
    rows: Annotated[int, typer.Option(min=1000, help="impressions")] = 200_000,
    ranks: NumRanks = 2,
) -> None:
    """Every step once, on a synthetic world, and how near the model comes to its truth."""
    from .demo import demo as whole_line

    whole_line(run, rows, ranks)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _check_run(run: str) -> Path:
    """Returns the folder of this machine that is the run, or stands for it."""
    from . import stack

    stack.check()
    from .nodes.mirror import located
    from .run_folder import read_recipe

    folder, at_url = located(run)
    read_recipe(folder, at_url)
    return folder


def _launch(command: str, options: dict[str, object], ranks: int, folder: Path, restarts: int = 0) -> None:
    from .local import launch

    given = {key: value for key, value in {**options, "restarts": restarts}.items() if value not in (None, False)}
    log_dir = folder / "logs"
    with contextlib.suppress(OSError):
        log_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(log_dir, os.W_OK):  # a run that others own can still be evaluated
        log_dir = Path(tempfile.mkdtemp(prefix="triptych_logs_"))
    args = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    launch(command, args, ranks=ranks, log_dir=log_dir)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. What goes wrong is one line on stderr: exit code 2 for wrong input, 1 for a failure, 130 when interrupted."""
    from torchx.schedulers.local_scheduler import SignalException

    from .local import INTERRUPTED, RanksFailed, Stopped

    try:
        code = app(args, standalone_mode=False)
        if code == 130:  # what the parser makes of Ctrl-C, without a word
            raise Stopped(INTERRUPTED)
        sys.exit(code)
    except (InputError, RanksFailed) as error:
        print(f"triptych: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Stopped as stopped:
        print(f"triptych: {stopped}", file=sys.stderr)
        sys.exit(130)
    except (KeyboardInterrupt, SignalException, typer.Abort):
        print(f"triptych: {INTERRUPTED}", file=sys.stderr)
        sys.exit(130)
    except USAGE_ERROR as error:
        if args == [] or (args is None and len(sys.argv) == 1):
            print(error.format_message())  # no command: the help
            sys.exit(0)
        print(f"triptych: {error.format_message()}; see triptych --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
