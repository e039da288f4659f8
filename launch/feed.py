"""What feeds training: the loader of the training files, what is fitted to them, and batches handed out step by step."""

from __future__ import annotations

from collections.abc import Iterator

from ..datasets.batch import Batch
from ..datasets.fitted import Fitted, read_keys
from ..datasets.fitting import gather, joined, needs_fitting
from ..datasets.loader import Loader
from ..datasets.parquet.decode import Decoder
from ..datasets.parquet.listing import Listing
from .config import Recipe
from .console import ProgressLines
from .distributed import Ranks
from .faults.stages import stage

BATCHES_IN_PIPELINE = 3


class Feed:
    """The batches of steps (step, last], handed out one by one. Which is the last may be decided while they are."""

    def __init__(self, batches: Iterator[Batch], step: int, last: int) -> None:
        self.batches, self.step, self.last = batches, step, last

    def __iter__(self) -> Iterator[Batch]:
        while self.step < self.last:
            self.step += 1
            stage(f"reading the batch of step {self.step}")
            batch = next(self.batches)
            stage(f"training, with the batch of step {self.step} read")
            yield batch

    def end_after(self, step: int) -> None:
        """End early. Batches are taken ahead of training, on some ranks further than on others: `step` is beyond them all."""
        self.last = min(self.last, step)
        assert self.step <= self.last, f"{self.step} batches were taken, {self.last} are to be trained"


def fit(recipe: Recipe, listing: Listing, ranks: Ranks) -> Fitted:
    """One pass over the training files, where a feature or table needs one. Collective."""
    schema = recipe.data_schema
    if not needs_fitting(schema):
        return ranks.from_first(lambda: Fitted(types=listing.types, keys=read_keys(schema)))
    stage("fitting")
    progress = ProgressLines("fit", ranks.is_first)
    parts = ranks.gather(gather(schema, listing, rank=ranks.rank, world_size=ranks.world_size, progress=progress))
    return ranks.from_first(lambda: joined(schema, listing, parts))


def train_loader(recipe: Recipe, listing: Listing, fitted: Fitted, ranks: Ranks) -> Loader:
    schema, data = recipe.data_schema, recipe.data
    loader = Loader(
        Decoder(schema, fitted),
        listing.slices,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=recipe.train.seed,
        shuffle=data.shuffle,
        window=data.shuffle_row_groups if data.shuffle else 1,
    )
    loader.tally.bad_files |= listing.bad_files
    return loader
