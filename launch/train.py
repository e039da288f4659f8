"""One rank of training: torchrun -m triptych.launch.train --recipe R --run DIR [--set a.b=c ...] [--resume]"""

from . import stack

stack.check()

from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from .build import plan_of  # noqa: E402
from .config import load_recipe  # noqa: E402
from .distributed import machine_of_ranks, process_group, quiet_the_stack, run_rank  # noqa: E402
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
        plan = plan_of(resolved, machine_of_ranks(), run if resume else None)
        with process_group() as ranks:
            if ranks.is_first:
                check_data(resolved)
            Trainer(resolved, run, ranks, resume=resume, plan=plan).fit()

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
