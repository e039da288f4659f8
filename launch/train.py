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
from .config import load_recipe  # noqa: E402
from .console import FAILURE_FILE, say  # noqa: E402
from .distributed import machine_of_ranks, process_group, quiet_the_stack, run_rank  # noqa: E402
from .faults.reasons import STOPPED, attempt, leave_reason  # noqa: E402
from .faults.stages import stage  # noqa: E402
from .inference import check_data  # noqa: E402
from .trainer import Trainer  # noqa: E402


def main(
    recipe: Annotated[str, typer.Option()],
    run: Annotated[Path, typer.Option("--run", "--run-dir")],
    set: Annotated[list[str] | None, typer.Option()] = None,
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    def work() -> None:
        quiet_the_stack()
        resolved = load_recipe(recipe, set or [])
        # What does not fit is refused before the ranks wait for each other.
        plan = plan_of(resolved, machine_of_ranks(), run if resume or attempt() else None)
        with process_group(resolved.train.timeout_s) as ranks:
            # Of several nodes, those that joined again without a failure of their own did not count it.
            restarts = max(ranks.all_gather(attempt()))
            if ranks.is_first:
                if restarts and FAILURE_FILE not in os.environ:  # else the launcher says so, and why
                    say(f"restart {restarts}: going on from the last checkpoint")
                stage("checking the data")
                check_data(resolved)
            trainer = Trainer(resolved, run, ranks, resume=resume or restarts > 0, plan=plan)
            is_whole = trainer.fit()
        if not is_whole:
            leave_reason("stopped", f"stopped at step {trainer.step} as asked, and saved; go on with --resume")
            sys.exit(STOPPED)

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
