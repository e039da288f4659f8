"""One rank of prediction: torchrun -m triptych.launch.predict --run DIR --data PATH --out FILE.parquet"""

from . import stack

stack.check()

import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import typer  # noqa: E402

from ..datasets.files import list_row_groups  # noqa: E402
from ..datasets.parquet import check_columns  # noqa: E402
from .console import ProgressLines, say  # noqa: E402
from .distributed import process_group, run_rank  # noqa: E402
from .inference import entity_loader, given_files, predict_rows  # noqa: E402
from .run_folder import load_run, read_recipe  # noqa: E402


def main(
    run: Annotated[Path, typer.Option("--run", "--run-dir")],
    data: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
) -> None:
    def work() -> None:
        recipe = read_recipe(run)
        files = given_files(recipe.data_schema, data)
        for path in files:
            check_columns(recipe.data_schema, path, labels=False)
        with process_group() as ranks:
            loader = entity_loader(recipe.data_schema, list_row_groups(files), ranks)
            built, step = load_run(run, recipe, ranks)
            prediction_NT = predict_rows(built.model, loader, ranks, ProgressLines("predict", ranks.is_first))
            if prediction_NT is not None:
                table = pa.table({task.name: prediction_NT[:, t] for t, task in enumerate(recipe.tasks)})
                out.parent.mkdir(parents=True, exist_ok=True)
                beside = out.with_name(out.name + ".writing")
                pq.write_table(table, beside, compression="zstd", write_page_checksum=True)
                os.replace(beside, out)
                say(f"{len(table)} rows of {', '.join(table.column_names)} from step {step} in {out}")

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
