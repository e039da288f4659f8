"""Damaged checkpoints: whatever happens to a file is found before a tensor is used, and nothing in one is ever executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.ranks import run_on_ranks
from tests.small import write_log
from triptych.datasets.schema import InputError
from triptych.launch.checkpoints.manifest import MANIFEST, committed, signed
from triptych.launch.checkpoints.reader import Reader, open_newest
from triptych.launch.config import load_recipe
from triptych.launch.distributed import Ranks
from triptych.launch.trainer import Trainer

SHORT, LONG = 200, 5000


def train(ranks: Ranks, path: Path, run: Path) -> None:
    recipe = load_recipe(path, ["checkpoint.every_steps=2", "checkpoint.keep=1000", "tables.words.ids=dynamic"])
    Trainer(recipe, run, ranks, resume=False).fit()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short training on two ranks."""
    root = tmp_path_factory.mktemp("damage")
    run_on_ranks(2, train, write_log(root / "log"), root / "run")
    return root / "run" / "checkpoints"


class Damage:
    """One thing that happens to a checkpoint; says what in `kind`, and to which file."""

    def __init__(self, rng: Random, folder: Path, other: Path) -> None:
        files = sorted(path.name for path in folder.iterdir())
        self.file = rng.choice([*files, MANIFEST])  # the manifest has little text and much to say
        self.kind = rng.choice(["flip", "flip", "flip", "truncate", "append", "zero", "missing", "other step", "other rank", "empty"])
        path = folder / self.file
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        if self.kind == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif self.kind == "truncate":
            del content[place:]
        elif self.kind == "append":
            content += rng.randbytes(rng.randint(1, 9))
        elif self.kind == "zero":
            span = slice(place, min(len(content), place + rng.randint(1, 4096)))
            content[span] = bytes(0 if byte else 1 for byte in content[span])  # another byte, even where it was 0
        elif self.kind == "empty":
            content.clear()
        elif self.kind == "other step":
            content = bytearray((other / self.file).read_bytes())
        elif self.kind == "other rank":
            content = bytearray((folder / rng.choice([name for name in files if name != self.file])).read_bytes())
        path.write_bytes(content)
        if self.kind == "missing":
            path.unlink()


def open_damaged(ranks: Ranks, checkpoints: Path, scratch: Path, count: int) -> tuple[Counter[str], list[str]]:
    """How many damages of each kind were found, and those that were not, or not by name."""
    before, newest = committed(checkpoints)[-2:]
    kinds: Counter[str] = Counter()
    unnoticed = []
    for seed in range(count):
        folder = scratch / newest.name
        shutil.copytree(newest, folder)
        damage = Damage(Random(seed), folder, before)
        kinds[damage.kind] += 1
        try:
            Reader(folder)
            unnoticed.append(f"{seed}: {damage.kind} of {damage.file}")
        except InputError as error:
            if str(folder / damage.file) not in str(error):
                unnoticed.append(f"{seed}: {damage.kind} of {damage.file} is called {error}")
        shutil.rmtree(folder)
    return kinds, unnoticed


def check(checkpoints: Path, scratch: Path, count: int) -> None:
    kinds, unnoticed = run_on_ranks(1, open_damaged, checkpoints, scratch, count, timeout=1200)[0]
    assert not unnoticed
    assert len(kinds) == 8 and kinds.total() == count
    print(f"{count} of {count} damages found: {', '.join(f'{kind} {number}' for kind, number in kinds.items())}")


def test_every_damage_is_found_and_named(checkpoints: Path, tmp_path: Path) -> None:
    check(checkpoints, tmp_path, SHORT)


@pytest.mark.long
def test_every_damage_of_many_is_found_and_named(checkpoints: Path, tmp_path: Path) -> None:
    check(checkpoints, tmp_path, LONG)


def flip_each_bit(ranks: Ranks, checkpoints: Path, scratch: Path) -> tuple[int, list[int]]:
    """Bits of the manifest's first and last 512 bytes, and which of them may flip unnoticed."""
    newest = committed(checkpoints)[-1]
    folder = scratch / newest.name
    shutil.copytree(newest, folder)
    text = (folder / MANIFEST).read_bytes()
    bits = [*range(8 * 512), *range(8 * (len(text) - 512), 8 * len(text))]
    unnoticed = []
    for bit in bits:
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / MANIFEST).write_bytes(flipped)
        try:
            Reader(folder)
            unnoticed.append(bit)
        except InputError:
            continue
    return len(bits), unnoticed


def test_no_bit_of_a_manifest_flips_unnoticed(checkpoints: Path, tmp_path: Path) -> None:
    assert run_on_ranks(1, flip_each_bit, checkpoints, tmp_path)[0] == (2 * 8 * 512, [])


class Malicious:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def open_malicious(ranks: Ranks, checkpoints: Path, scratch: Path) -> list[str]:
    """What opening says where each file of a checkpoint in turn is a pickle, and with pickles beside the files."""
    newest, found = committed(checkpoints)[-1], []
    poison = pickle.dumps(Malicious(scratch / "executed"))
    for name in [*sorted(path.name for path in newest.iterdir()), ".metadata", "rank_0.pt"]:
        run = scratch / name / "checkpoints"
        shutil.copytree(newest, run / newest.name)
        (run / newest.name / name).write_bytes(poison)
        try:
            reader = next(open_newest(run))
            assert {tensor: reader.read(tensor) for tensor in reader.names()}
            found.append("opened")
        except InputError as error:
            assert "no checkpoint in it is whole" in str(error)
            found.append("refused")
    return found


def test_no_pickle_is_executed(checkpoints: Path, tmp_path: Path) -> None:
    number_of_files = len(list(committed(checkpoints)[-1].iterdir()))
    assert run_on_ranks(1, open_malicious, checkpoints, tmp_path)[0] == ["refused"] * number_of_files + ["opened"] * 2
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))  # noqa: S301
    assert (tmp_path / "executed").exists()


def rename_steps(ranks: Ranks, checkpoints: Path, scratch: Path) -> str:
    """An older checkpoint under the name of a newer one."""
    older, newest = committed(checkpoints)[-2:]
    shutil.copytree(older, scratch / newest.name)
    with pytest.raises(InputError) as error:
        Reader(scratch / newest.name)
    return str(error.value)


def test_a_checkpoint_of_another_step_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    older = committed(checkpoints)[-2]
    assert f"is of step {older.name.removeprefix('step_')}" in run_on_ranks(1, rename_steps, checkpoints, tmp_path)[0]


def open_what_cannot_be_read(ranks: Ranks, checkpoints: Path, scratch: Path) -> list[str]:
    """What resuming says of a checkpoint in another format, of one that cannot be read, and of a run that has none that is whole."""
    newest = committed(checkpoints)[-1]
    said = []
    for kind in ("format", "unreadable", "gone", "gone"):
        run = scratch / kind / "checkpoints"
        if not run.exists():
            shutil.copytree(newest, run / newest.name)
            path = run / newest.name / MANIFEST
            if kind == "format":
                content = json.loads(path.read_text())
                del content["sha256"]
                path.write_text(signed(content | {"format": 99}))
            elif kind == "unreadable":
                file = run / newest.name / "rank_1.0.safetensors"
                file.unlink()
                file.symlink_to(file)  # a loop, as root may read anything else
            else:
                path.write_text("{}")
        with pytest.raises(InputError) as error:
            next(open_newest(run))
        said.append(str(error.value))
        assert (run / newest.name).exists() == (kind != "gone")
    return said


def test_only_damage_is_set_aside_and_a_run_never_begins_anew_over_it(checkpoints: Path, tmp_path: Path) -> None:
    said = run_on_ranks(1, open_what_cannot_be_read, checkpoints, tmp_path)[0]
    assert "checkpoint format 99; this version reads" in said[0]
    assert "cannot be read" in said[1]
    assert all("no checkpoint in it is whole; restore one, or start another run" in line for line in said[2:])
