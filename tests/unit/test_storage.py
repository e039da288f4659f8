"""Files are found, opened and read the same on a local disk, on S3 and through fsspec; what fails on the way is tried again."""

from __future__ import annotations

import glob
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.s3_server import BUCKET, serve_s3, upload, use
from triptych.datasets.schema import InputError
from triptych.datasets.storage import access as storage
from triptych.datasets.storage.access import find_files, is_there, open_input, with_retries

TABLE = pa.table({"user": [f"user {i * 7919 % 10007}" for i in range(40_000)], "price": [i / 3 for i in range(40_000)]})
LOG = f"s3://{BUCKET}/log"
TREE = (
    "a.parquet",
    "b.parquet",
    "notes.txt",
    "_SUCCESS",
    ".hidden.parquet",
    "_temporary/t.parquet",
    "val.parquet/part-1.parquet",
    "val.parquet/part-0.parquet",
    "val.parquet/deep/er/part-2.parquet",
    "val.parquet/_SUCCESS",
    "day=1 2/x[1].parquet",
    "day=3/x2.parquet",
    "only text/readme.txt",
)
FOUND = {
    ".": ["a", "b", "day=1 2/x[1]", "day=3/x2", "val.parquet/deep/er/part-2", "val.parquet/part-0", "val.parquet/part-1"],
    "*.parquet": ["a", "b", "val.parquet/deep/er/part-2", "val.parquet/part-0", "val.parquet/part-1"],
    "a.parquet": ["a"],
    "./val.parquet/": ["val.parquet/deep/er/part-2", "val.parquet/part-0", "val.parquet/part-1"],
    "val.parquet/*": ["val.parquet/deep/er/part-2", "val.parquet/part-0", "val.parquet/part-1"],
    "val.parquet/part-?.parquet": ["val.parquet/part-0", "val.parquet/part-1"],
    "v*/deep/*/part-2.parquet": ["val.parquet/deep/er/part-2"],
    "day=*/*": ["day=1 2/x[1]", "day=3/x2"],
    "day=1 2/x[1].parquet": ["day=1 2/x[1]"],
    "day=[0-2]*": ["day=1 2/x[1]"],
    "**/part-*.parquet": ["val.parquet/deep/er/part-2", "val.parquet/part-0", "val.parquet/part-1"],
    "**/x*.parquet": ["day=1 2/x[1]", "day=3/x2"],
    "**/deep": ["val.parquet/deep/er/part-2"],
    "_temporary/*": ["_temporary/t"],
    "_temporary": ["_temporary/t"],
    ".hid*": [".hidden"],
}


def refusal(function, *args):
    with pytest.raises(InputError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def plant(root: Path, names) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """A local tree of files; a.parquet is one indeed."""
    root = plant(tmp_path_factory.mktemp("log"), TREE)
    pq.write_table(TABLE, root / "a.parquet", 10_000, compression="zstd", write_page_checksum=True)
    return root


@pytest.fixture(scope="module")
def server(log) -> Iterator[int]:
    """The port of an S3 server that holds the tree."""
    with serve_s3() as port:
        upload(port, log, "log")
        yield port


@pytest.fixture
def s3(server, monkeypatch) -> int:
    use(monkeypatch, server)
    return server


@pytest.fixture(params=["local", "s3", "memory"])
def root(request, log) -> str:
    """The tree, on each kind of storage."""
    if request.param == "local":
        return str(log)
    if request.param == "s3":
        request.getfixturevalue("s3")
        return LOG
    memory = fsspec.filesystem("memory")
    for path in log.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/log/{path.relative_to(log)}", path.read_bytes())
    request.addfinalizer(lambda: memory.rm("/log", recursive=True))
    return "memory://log"


class TestFinding:
    @pytest.mark.parametrize("pattern", FOUND)
    def test_every_storage_finds_the_same_below_its_root(self, root, pattern):
        expected = [f"{root}/{name}.parquet" for name in FOUND[pattern]]
        assert find_files(root, pattern) == expected
        assert is_there(f"{root}/{pattern}")
        assert find_files("elsewhere", f"{root}/{pattern}") == expected

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("b.paruqet", "no such file: {}/b.paruqet (did you mean 'b.parquet'?)"),
            ("nowhere/f.parquet", "no such file: {}/nowhere/f.parquet"),
            ("*.csv", "no such file: {}/*.csv"),
            ("no*/f.parquet", "no such file: {}/no*/f.parquet"),
            ("**/f.parquet", "no such file: {}/**/f.parquet"),
            ("b.parquet/f.parquet", "no such file: {}/b.parquet/f.parquet"),
            ("b.parquet/*", "no such file: {}/b.parquet/*"),
            ("b.parquet/**/f.parquet", "no such file: {}/b.parquet/**/f.parquet"),
            ("only text", "{}/only text: a folder without parquet files"),
            ("only*", "{}/only*: a folder without parquet files"),
            ("*emporary", "no such file: {}/*emporary (did you mean '_temporary'?)"),
        ],
    )
    def test_nothing_to_find(self, root, pattern, message):
        assert refusal(find_files, root, pattern) == message.format(root)
        assert is_there(f"{root}/{pattern}") == ("only" in pattern)

    def test_sizes_and_bytes(self, root, log):
        for name in TREE:
            content = (log / name).read_bytes()
            with open_input(f"{root}/{name}") as file:
                assert file.size() == len(content) and file.read() == content
        for missing in (f"{root}/nothing.parquet", f"{root}/nowhere/a.parquet"):
            assert refusal(open_input, missing).startswith(f"no such file: {missing}")
        assert refusal(open_input, f"{root}/val.parquet").count(f"{root}/val.parquet")

    def test_a_parquet_file_reads_the_same(self, root):
        file = pq.ParquetFile(open_input(f"{root}/a.parquet"), page_checksum_verification=True)
        assert file.num_row_groups == 4 and file.read().equals(TABLE)

    def test_a_path_and_a_file_url_are_local(self, log, monkeypatch):
        assert find_files(log, "a.parquet") == find_files("s3://bucket", f"file://{log}/a.*") == [f"{log}/a.parquet"]
        assert find_files(f"file://{log}", "a.parquet") == [f"{log}/a.parquet"]
        monkeypatch.chdir(log)
        assert find_files(".", "day*") == ["day=1 2/x[1].parquet", "day=3/x2.parquet"]
        assert find_files("val.parquet", "deep") == ["val.parquet/deep/er/part-2.parquet"]
        assert is_there("day*") and is_there("b.parquet") and not is_there("train*")

    def test_a_root_named_like_a_glob(self, tmp_path):
        plant(tmp_path / "[ab]", ["x[1].parquet"])
        for pattern in ("x[1].parquet", "*.parquet", "."):
            assert find_files(tmp_path / "[ab]", pattern) == [f"{tmp_path}/[ab]/x[1].parquet"]

    def test_links_to_folders_are_followed_once(self, tmp_path):
        plant(tmp_path, ["log/day/a.parquet", "other/b.parquet"])
        (tmp_path / "log/day/up").symlink_to(tmp_path / "log")
        (tmp_path / "log/day/here").symlink_to(".")
        (tmp_path / "log/other").symlink_to(tmp_path / "other")
        (tmp_path / "log/broken.parquet").symlink_to(tmp_path / "nothing")
        for pattern in (".", "**/*.parquet"):
            assert find_files(tmp_path / "log", pattern) == [f"{tmp_path}/log/day/a.parquet", f"{tmp_path}/log/other/b.parquet"]

    @settings(deadline=None, max_examples=60)
    @given(
        paths=st.lists(st.lists(st.sampled_from(["a", "b.x", "ab", "[a]"]), min_size=1, max_size=3).map("/".join), min_size=1, max_size=6),
        pattern=st.lists(st.sampled_from(["*", "**", "a*", "?b", "[ab]*", "b.x", "a", "nothing"]), min_size=1, max_size=4).map("/".join),
    )
    def test_globs_mean_what_they_mean_to_python(self, tmp_path_factory, paths, pattern):
        root = plant(tmp_path_factory.mktemp("tree"), [f"{path}/file.parquet" for path in paths])
        expected: set[str] = set()
        for match in glob.glob(pattern, root_dir=root, recursive=True):
            if not (root / match).exists():
                continue  # Python lets `**` match nothing at all in a folder that is not there
            inside = glob.glob("**/*.parquet", root_dir=root / match, recursive=True) if (root / match).is_dir() else [""]
            expected.update(os.path.normpath(root / match / path) for path in inside)
        if expected:
            assert find_files(root, pattern) == sorted(expected)
        else:
            assert refusal(find_files, root, pattern).startswith(f"no such file: {root}/{pattern}")


class TestRetries:
    URL = "s3://bucket/a.parquet"

    def tried(self, name, errors, caplog):
        """Tries it took until `errors` were used up, or the error in the end; and the lines of the log."""
        left = list(errors)
        count = 0

        def action():
            nonlocal count
            count += 1
            if left:
                raise left.pop(0)
            return "done"

        try:
            assert with_retries(name, action) == "done"
        except Exception as error:
            assert error is errors[count - 1]
        return count, [record.getMessage() for record in caplog.records]

    def test_a_dropped_connection_is_tried_again_and_said(self, caplog):
        count, lines = self.tried(self.URL, [OSError("dropped"), ConnectionResetError(104, "reset"), TimeoutError()], caplog)
        assert count == 4
        expected = (
            f"{self.URL}: dropped; try 2 of 5 in ",
            f"{self.URL}: [Errno 104] reset; try 3 of 5 ",
            f"{self.URL}: TimeoutError; try 4 of 5 ",
        )
        assert len(lines) == 3 and all(map(str.startswith, lines, expected))

    def test_the_last_error_comes_as_it_is(self, caplog):
        count, lines = self.tried(self.URL, [OSError(f"{i}") for i in range(9)], caplog)
        assert count == storage.TRIES == 5 and len(lines) == 4

    def test_waits_double_and_vary(self, monkeypatch, caplog):
        monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.04)
        start = time.monotonic()
        self.tried(self.URL, [OSError("x")] * 4, caplog)
        assert 0.02 * 15 <= time.monotonic() - start < 0.04 * 15 + 1

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError("gone"),
            PermissionError("no"),
            ValueError("no storage's"),
            pa.ArrowInvalid("no storage's"),
            OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
            OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation"),
            OSError("could not verify page integrity, CRC checksum verification failed for page_ordinal 0"),
            OSError("Couldn't deserialize thrift: No more data to read."),
        ],
        ids=str,
    )
    def test_what_trying_again_does_not_mend(self, error, caplog):
        assert self.tried(self.URL, [error, error], caplog) == (1, [])

    def test_a_name_that_says_denied_is_no_reason_to_give_up(self, caplog):
        error = OSError("When getting information for key 'page/403' in bucket 'ACCESS_DENIED': AWS Error NETWORK_CONNECTION")
        assert self.tried(self.URL, [error], caplog)[0] == 2

    def test_local_names_are_tried_once(self, caplog):
        assert self.tried("/log/a.parquet", [OSError("disk"), OSError("disk")], caplog) == (1, [])

    def test_the_random_numbers_of_training_stay(self, caplog):
        state = random.getstate()
        self.tried(self.URL, [OSError("x")] * 3, caplog)
        assert random.getstate() == state
