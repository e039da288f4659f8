"""One rank of evaluation: torchrun -m triptych.launch.evaluate --run DIR --data PATH [--json FILE]"""

from . import stack
from .faults.start import start_rank

start_rank()
stack.check()

from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from ..datasets.fitted import Fitted  # noqa: E402
from .console import ProgressLines, say, summary  # noqa: E402
from .distributed import process_group, run_rank  # noqa: E402
from .faults.stages import stage  # noqa: E402
from .inference import Split, given_files  # noqa: E402
from .run_folder import load_run, read_recipe  # noqa: E402
from .writing import write_json  # noqa: E402


def main(
    run: Annotated[Path, typer.Option("--run", "--run-dir")],
    data: Annotated[str, typer.Option()],
    json: Annotated[Path | None, typer.Option()] = None,
) -> None:
    def work() -> None:
        recipe = read_recipe(run)
        with process_group(recipe.train.timeout_s) as ranks:
            stage("listing files")
            schema = recipe.data_schema
            fitted = ranks.from_first(lambda: Fitted.load(run, schema))
            split = Split(Path(data.partition("?")[0]).stem, schema, recipe.tasks, given_files(schema, data), ranks, fitted)
            stage("building the model")
            built, step = load_run(run, recipe, fitted, ranks)
            metrics = split.evaluate(built, step, ProgressLines("evaluate", ranks.is_first))
            if metrics is not None:
                say(f"{split.name}, {metrics['rows']} rows, step {step}: {summary(metrics)}")
                if json is not None:
                    write_json(json, metrics)

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
