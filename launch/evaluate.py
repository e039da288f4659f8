"""One rank of evaluation: torchrun -m triptych.launch.evaluate --run DIR --data PATH [--json FILE]"""

from . import stack
from .faults.start import start_rank

start_rank()
stack.check()

from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from .console import ProgressLines, say, summary  # noqa: E402
from .distributed import process_group, run_rank  # noqa: E402
from .faults.stages import stage  # noqa: E402
from .inference import Split, given_files  # noqa: E402
from .nodes.mirror import located  # noqa: E402
from .nodes.remote import check_output, delivered  # noqa: E402
from .nodes.visible import check_visible  # noqa: E402
from .run_folder import files_of_run, load_run, read_fitted, read_recipe  # noqa: E402
from .writing import write_json  # noqa: E402


def main(
    run: Annotated[str, typer.Option("--run", "--run-dir")],
    data: Annotated[str, typer.Option()],
    json: Annotated[str | None, typer.Option()] = None,
) -> None:
    def work() -> None:
        folder, at_url = located(run)
        recipe = read_recipe(folder, at_url)
        with process_group(recipe.train.timeout_s) as ranks:
            if json is not None:
                ranks.from_first(lambda: check_output(json))
            stage("listing files")
            schema = recipe.data_schema
            files = ranks.from_first(lambda: given_files(schema, data))
            check_visible(ranks, files=lambda: [*([] if at_url else files_of_run(folder)), *files])
            fitted = read_fitted(folder, recipe, ranks, at_url)
            split = Split(Path(data.partition("?")[0]).stem, schema, recipe.tasks, files, ranks, fitted)
            stage("building the model")
            built, step = load_run(folder, recipe, fitted, ranks, at_url)
            metrics = split.evaluate(built, step, ProgressLines("evaluate", ranks.is_first))
            if metrics is not None:
                say(f"{split.name}, {metrics['rows']} rows, step {step}: {summary(metrics)}")
                if json is not None:
                    with delivered(json) as path:
                        write_json(path, metrics)

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
