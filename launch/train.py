"""One rank of training: torchrun -m triptych.launch.train --recipe R --run DIR [--set a.b=c ...] [--resume]"""

from . import stack
from .faults.start import start_rank

start_rank()
stack.check()

import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from .build import plan_of  # noqa: E402
from .checkpoints.start_from import checkpoint_to_start_from  # noqa: E402
from .config import Recipe, load_recipe  # noqa: E402
from .console import FAILURE_FILE, say  # noqa: E402
from .distributed import machine_of_ranks, process_group, quiet_the_stack, run_rank  # noqa: E402
from .faults.reasons import STOPPED, attempt, leave_reason  # noqa: E402
from .faults.stages import stage  # noqa: E402
from .inference import check_data, given_files, split_files  # noqa: E402
from .nodes.facts import RUN_FILE, is_of_this_job  # noqa: E402
from .nodes.mirror import Mirror, located  # noqa: E402
from .nodes.remote import is_remote  # noqa: E402
from .nodes.visible import check_visible  # noqa: E402
from .trainer import Trainer  # noqa: E402


def _files_to_read(recipe: Recipe, *, starts: bool) -> list[str | Path]:
    """Of the recipe's data, and where the run starts from another one, of that checkpoint."""
    data, found = recipe.data, list[str | Path]()
    for source in (data.train, data.valid, data.items if recipe.retrieval else None):
        found += split_files(recipe.data_schema, source) if source else []
    start = recipe.checkpoint.start_from
    if starts and start is not None and not is_remote(start):
        folder = checkpoint_to_start_from(recipe)
        assert folder is not None
        found += sorted(path for path in folder.iterdir() if path.is_file())
    return found


def main(
    recipe: Annotated[str, typer.Option()],
    run: Annotated[str, typer.Option("--run", "--run-dir")],
    set: Annotated[list[str] | None, typer.Option()] = None,
    resume: Annotated[bool, typer.Option("--resume")] = False,
    evaluates_later: Annotated[str | None, typer.Option()] = None,
) -> None:
    def work() -> None:
        quiet_the_stack()
        folder, at_url = located(str(run))
        resolved = load_recipe(recipe, set or [])
        if at_url is not None:
            at_url.fetch(RUN_FILE)
        goes_on = resume or attempt() > 0 or is_of_this_job(folder)
        if at_url is not None and goes_on:
            at_url.fetch("plan.json")
        # What does not fit is refused before the ranks wait for each other.
        plan = plan_of(resolved, machine_of_ranks(), folder if goes_on else None)
        with process_group(resolved.train.timeout_s) as ranks:
            # Of several nodes, those that joined again without a failure of their own did not count it.
            restarts = max(ranks.all_gather(attempt()))
            resumes = ranks.from_first(lambda: goes_on) or restarts > 0
            folders = [] if at_url else [folder]
            check_visible(ranks, folders=folders, files=lambda: _files_to_read(resolved, starts=not resumes))
            if ranks.is_first:
                if restarts and (FAILURE_FILE not in os.environ or not attempt()):  # else the launcher says so, and why
                    say(f"restart {restarts}: going on from the last checkpoint")
                stage("checking the data")
                check_data(resolved)
                if evaluates_later is not None:  # better known now than after the training
                    given_files(resolved.data_schema, evaluates_later)
            mirror = Mirror(at_url, ranks) if at_url else None
            trainer = Trainer(resolved, folder, ranks, resume=resumes, plan=plan, mirror=mirror)
            is_whole = trainer.fit()
        if not is_whole:
            leave_reason("stopped", f"stopped at step {trainer.step} as asked, and saved; go on with --resume")
            sys.stdout.flush()
            os._exit(STOPPED)  # threads may still ask a store that is gone

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
