"""With a key_file, raw ids reach no file of a run or an export, and only the key finds a user's vector."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import refused, succeeds, triptych
from tests.small import rows, write_log

NAMES = np.array([f"person-{number:03d}-of-the-log" for number in range(200)])


def named(columns: dict) -> pa.Table:
    bought = [[NAMES[user] for user in users] for users in columns["bought"]]
    return pa.table(columns | {"user": NAMES[columns["user"]], "bought": bought})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose user ids are names, trained with a key and exported."""
    folder = tmp_path_factory.mktemp("private")
    recipe = write_log(folder / "log")
    for name, count, seed in (("train", 700, 0), ("valid", 200, 1)):
        pq.write_table(named(rows(count, seed)), folder / "log" / f"{name}.parquet", row_group_size=150)
    (folder / "user.key").write_text("a secret of more than sixteen bytes")
    key = f"tables.user.key_file={folder / 'user.key'}"
    succeeds("train", "--recipe", recipe, "--run", folder / "run", "--set", key)
    succeeds("export", "--run", folder / "run", "--out", folder / "vectors")
    return folder


def test_no_file_holds_a_raw_id_or_the_key(folder: Path) -> None:
    files = [path for part in ("run", "vectors") for path in (folder / part).rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert b"-of-the-log" not in content and b"a secret of more" not in content, path
    hashed = pq.read_table(folder / "vectors/users").column("user").to_pylist()
    assert len(set(hashed)) == len(hashed) and all(len(id_) == 16 and int(id_, 16) >= 0 for id_ in hashed)


def test_the_key_finds_a_user_and_nothing_else_does(folder: Path) -> None:
    search = ("search", "--index", folder / "vectors", "-k", 3, "--json")
    user = pq.read_table(folder / "log/train.parquet").column("user")[0].as_py()
    found = succeeds(*search, "--user", user, "--key-file", folder / "user.key")
    assert found.count("score") == 3
    assert "the ids are hashed, give their --key-file" in refused(triptych(*search, "--user", user))
    (folder / "other.key").write_text("another secret of sixteen bytes")
    assert "is not in" in refused(triptych(*search, "--user", user, "--key-file", folder / "other.key"))


def test_another_key_is_refused(folder: Path) -> None:
    secret = (folder / "user.key").read_text()
    (folder / "user.key").write_text("another secret of sixteen bytes")
    try:
        line = refused(triptych("evaluate", "--run", folder / "run", "--data", "valid.parquet"))
    finally:
        (folder / "user.key").write_text(secret)
    assert "table 'user' was trained with another key" in line
