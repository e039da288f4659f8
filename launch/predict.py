"""One rank of prediction: torchrun -m triptych.launch.predict --run DIR --data PATH --out FILE.parquet"""

from . import stack
from .faults.start import start_rank

start_rank()
stack.check()

import os  # noqa: E402
from typing import Annotated  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import typer  # noqa: E402

from ..datasets.parquet.decode import Decoder  # noqa: E402
from ..datasets.parquet.listing import list_slices  # noqa: E402
from ..datasets.schema import InputError  # noqa: E402
from .console import ProgressLines, say  # noqa: E402
from .distributed import process_group, run_rank  # noqa: E402
from .faults.stages import stage  # noqa: E402
from .inference import entity_loader, given_files, predict_rows  # noqa: E402
from .nodes.mirror import located  # noqa: E402
from .nodes.remote import check_output, delivered  # noqa: E402
from .nodes.visible import check_visible  # noqa: E402
from .run_folder import files_of_run, load_run, read_fitted, read_recipe  # noqa: E402


def main(
    run: Annotated[str, typer.Option("--run", "--run-dir")],
    data: Annotated[str, typer.Option()],
    out: Annotated[str, typer.Option()],
) -> None:
    def work() -> None:
        folder, at_url = located(run)
        recipe = read_recipe(folder, at_url)
        with process_group(recipe.train.timeout_s) as ranks:
            ranks.from_first(lambda: check_output(out))
            stage("listing files")
            schema = recipe.data_schema
            paths = ranks.from_first(lambda: given_files(schema, data))
            check_visible(ranks, files=lambda: [*([] if at_url else files_of_run(folder)), *paths])
            fitted = read_fitted(folder, recipe, ranks, at_url)
            listing = ranks.from_first(lambda: list_slices(schema, paths, labels=False, types=fitted.types.copy()))
            for _, reason in listing.bad_files.values():
                raise InputError(f"{reason}; predict keeps the order of rows and cannot leave a file out: take it out of --data")
            loader = entity_loader(Decoder(schema, fitted, labels=False), listing.slices, ranks)
            stage("building the model")
            built, step = load_run(folder, recipe, fitted, ranks, at_url)
            predictions = predict_rows(built, loader, ranks, ProgressLines("predict", ranks.is_first))
            if predictions is not None:
                prediction_NT, is_read_N = predictions
                stage(f"writing {out}")
                table = pa.table({task.name: pa.array(prediction_NT[:, t], mask=~is_read_N) for t, task in enumerate(recipe.tasks)})
                with delivered(out) as path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    beside = path.with_name(path.name + ".writing")
                    pq.write_table(table, beside, compression="zstd", write_page_checksum=True)
                    os.replace(beside, path)
                skipped = table.column(0).null_count
                if skipped:
                    say(f"{skipped} rows could not be read and have no prediction")
                say(f"{len(table)} rows of {', '.join(table.column_names)} from step {step} in {out}")

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
