"""One rank of export: torchrun -m triptych.launch.export --run DIR --out DIR

OUT/users/part_R.parquet  OUT/items/part_R.parquet   ids and vectors, a part a rank
OUT/items.faiss  OUT/item_ids.parquet                the index, and the item id of each of its positions
OUT/export.json                                      what it was made from
"""

from . import stack
from .faults.start import start_rank

start_rank()
stack.check()

import shutil  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import typer  # noqa: E402

from ..datasets.batch import Batch  # noqa: E402
from ..datasets.entities import write_entities  # noqa: E402
from ..datasets.fitted import Fitted  # noqa: E402
from ..datasets.ids import hashed_ids  # noqa: E402
from ..datasets.parquet.decode import Decoder  # noqa: E402
from ..datasets.parquet.listing import list_slices  # noqa: E402
from ..datasets.schema import Feature, InputError  # noqa: E402
from ..embeddings.index import save_index  # noqa: E402
from ..embeddings.vectors import read_all, write_part  # noqa: E402
from .build import Built  # noqa: E402
from .config import Recipe  # noqa: E402
from .console import ProgressLines, say  # noqa: E402
from .distributed import Ranks, process_group, run_rank  # noqa: E402
from .faults.stages import stage  # noqa: E402
from .inference import entity_loader, run_rows, split_files  # noqa: E402
from .nodes.mirror import RunAtUrl, located  # noqa: E402
from .nodes.remote import check_folder, delivered, is_remote  # noqa: E402
from .nodes.visible import check_visible  # noqa: E402
from .run_folder import files_of_run, load_run, read_fitted, read_recipe  # noqa: E402
from .search import FACTS  # noqa: E402
from .writing import write_json  # noqa: E402


def side_vectors(built: Built, side: str) -> Callable[[Batch], torch.Tensor]:
    """Batch -> vectors [B, D] of one side. Looks all tables up, so every rank must call it as often."""
    model = built.task.model

    def compute(batch: Batch) -> torch.Tensor:
        return model.tower.encoders[side](model.lookup(batch.ids), batch.dense_BD)

    return compute


def exported_ids(ids: pa.Array, feature: Feature, fitted: Fitted) -> pa.Array:
    """The ids as an export holds them: themselves, or where their table has a key, its hashes in hexadecimal."""
    key = fitted.keys.get(str(feature.table))
    return ids if key is None else hashed_ids(ids, key)


def export_side(side: str, recipe: Recipe, built: Built, fitted: Fitted, ranks: Ranks, out: Path) -> int:
    """Write the vectors of every user, or of every item; returns their number. Collective."""
    entities = out / f"{side}s_rows.parquet"
    try:
        return _export_entities(side, recipe, built, fitted, ranks, out, entities)
    finally:
        if ranks.is_first:
            entities.unlink(missing_ok=True)  # it holds raw ids


def _export_entities(side: str, recipe: Recipe, built: Built, fitted: Fitted, ranks: Ranks, out: Path, entities: Path) -> int:
    """Write one row an entity to `entities`, and its vector below `out`.

    Returns:
        The number of entities.
    """
    assert recipe.retrieval is not None
    schema, data = recipe.data_schema, recipe.data
    id_feature = recipe.retrieval.user if side == "user" else recipe.retrieval.item
    source = data.items if side == "item" and data.items else data.train
    if source is None:
        raise InputError(f"the recipe has no data.train to take {side}s from")
    stage(f"collecting {side}s")
    if ranks.is_first:
        write_entities(schema, fitted, split_files(schema, source), id_feature, entities, ProgressLines(f"rows_of_{side}s", ranks.is_first))
    dist.barrier()
    others = [f.name for f in schema.features if f.side != side]
    listing = list_slices(schema, [str(entities)], labels=False, skip_features=others, types=fitted.types.copy())
    loader = entity_loader(Decoder(schema, fitted, labels=False, skip_features=others), listing.slices, ranks)
    built.model.eval()
    row_R, vector_RD = run_rows(side_vectors(built, side), built, loader, ProgressLines(f"{side}s", ranks.is_first))
    stage(f"writing vectors of {side}s")
    real = row_R >= 0
    ids = pq.read_table(entities, columns=[schema.feature(id_feature).column]).column(0).combine_chunks()
    ids = exported_ids(ids, schema.feature(id_feature), fitted)
    write_part(out / f"{side}s", ranks.rank, id_feature, ids.take(row_R[real].numpy()), vector_RD[real].numpy())
    dist.barrier()  # before the file goes
    return loader.num_rows


def export(run: Path, out: Path, ranks: Ranks, at_url: RunAtUrl | None = None) -> None:
    """Vectors, index and facts, written beside and renamed when whole. Collective."""
    recipe = read_recipe(run, at_url)
    if recipe.retrieval is None:
        raise InputError(f"{at_url or run}: its recipe has no [retrieval] section, so the model has no user and item vectors")
    if out.is_file():
        raise InputError(f"{out} is a file; export writes a folder: choose another --out")
    if out.exists() and not (out / FACTS).is_file() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no export; choose another --out")
    check_visible(ranks, folders=[out.absolute().parent], files=lambda: _files(run, recipe, at_url))
    fitted = read_fitted(run, recipe, ranks, at_url)
    stage("building the model")
    built, step = load_run(run, recipe, fitted, ranks, at_url)
    writing = out.with_name(out.name + ".writing")
    if ranks.is_first:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
    counts = {f"{side}s": export_side(side, recipe, built, fitted, ranks, writing) for side in ("user", "item")}
    if not ranks.is_first:
        return
    stage("building the index")
    ids, vector_ND = read_all(writing / "items", recipe.retrieval.item)
    save_index(writing, ids, vector_ND)
    facts = {
        "user": recipe.retrieval.user,
        "item": recipe.retrieval.item,
        "dim": recipe.retrieval.dim,
        "step": step,
        "score": "inner product",
        "user_ids_hashed": recipe.data_schema.feature(recipe.retrieval.user).table in fitted.keys,
    }
    write_json(writing / FACTS, facts | counts)
    shutil.rmtree(out, ignore_errors=True)
    writing.rename(out)
    say(f"{counts['users']} users and {counts['items']} items x {recipe.retrieval.dim} from step {step} in {out}")


def _files(run: Path, recipe: Recipe, at_url: RunAtUrl | None) -> list[str | Path]:
    """What an export reads."""
    schema, data = recipe.data_schema, recipe.data
    sources = {source: None for source in (data.train, data.items) if source}
    own = [] if at_url else files_of_run(run)
    return [*own, *(file for source in sources for file in split_files(schema, source))]


def main(run: Annotated[str, typer.Option("--run", "--run-dir")], out: Annotated[str, typer.Option()]) -> None:
    def work() -> None:
        folder, at_url = located(run)
        with process_group(read_recipe(folder, at_url).train.timeout_s) as ranks:
            if is_remote(out):
                if ranks.world_size > ranks.local_world_size:
                    raise InputError(
                        f"{out}: over several nodes an export is written to a folder that all of them see; give one, or use one node"
                    )
                if ranks.is_first:
                    check_folder(out, FACTS)
            with delivered(out) if ranks.is_first else nullcontext(Path()) as path:
                export(folder, ranks.from_first(lambda: path), ranks, at_url)

    run_rank(work)


if __name__ == "__main__":
    typer.run(main)
