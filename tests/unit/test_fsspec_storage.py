"""What fsspec's filesystems say when a connection drops is not taken for a missing file or an empty folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.s3_server import CuttingProxy
from triptych.datasets.schema import InputError
from triptych.datasets.storage import access as storage
from triptych.datasets.storage.access import StorageError, find_files, is_there, open_input, with_retries

TABLE = pa.table({"user": [f"user {i * 7919 % 10007}" for i in range(20_000)]})
FILES = ["a.parquet", "day/b.parquet", "day/more/c.parquet"]


class ClientError(Exception):
    """As the clients of fsspec have them: no OSError."""


class DroppingFileSystem(MemoryFileSystem):
    """Files in memory behind a connection that drops as often as `left` says, in the ways that fsspec's own filesystems have."""

    protocol = "dropping"
    left = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("dropping:/"))

    def drop(self) -> None:
        if type(self).left > 0:
            type(self).left -= 1
            raise ClientError("server disconnected")

    def info(self, path, **kwargs):
        try:
            self.drop()
        except ClientError as error:
            raise FileNotFoundError(path) from error
        return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self.drop()
        return super().ls(path, detail=detail, **kwargs)

    def open(self, path, mode="rb", **kwargs):
        file = super().open(path, mode, **kwargs)
        read = file.read
        file.read = lambda size=-1: (self.drop(), read(size))[1]
        return file


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def dropping() -> Iterator[type[DroppingFileSystem]]:
    fsspec.register_implementation("dropping", DroppingFileSystem, clobber=True)
    memory = MemoryFileSystem()
    for name in FILES:
        with memory.open(f"/log/{name}", "wb") as out:
            pq.write_table(TABLE, out, 5000)
    yield DroppingFileSystem
    DroppingFileSystem.left = 0
    memory.rm("/log", recursive=True)


class TestDrops:
    def test_everything_is_found_whichever_request_drops(self, dropping):
        for pattern in (".", "**/*.parquet", "*", "day", "day/*", "day/b.parquet"):
            expected = [f"dropping://log/{name}" for name in FILES if pattern in (".", "**/*.parquet", "*") or name.startswith("day")]
            expected = [name for name in expected if name.endswith("b.parquet")] if pattern == "day/b.parquet" else expected
            for drops in range(storage.TRIES):
                dropping.left = drops
                assert find_files("dropping://log", pattern) == expected and dropping.left == 0
                dropping.left = drops
                assert is_there(f"dropping://log/{pattern}") and dropping.left == 0

    def test_reading_goes_on(self, dropping):
        name = "dropping://log/a.parquet"
        file = pq.ParquetFile(open_input(name))
        for group in range(4):
            dropping.left = 3
            rows = with_retries(name, lambda group=group: file.read_row_group(group))
            assert rows.equals(TABLE.slice(group * 5000, 5000)) and dropping.left == 0

    @pytest.mark.parametrize("function", [lambda name: find_files("dropping://log", name), is_there])
    def test_endless_drops_are_no_missing_file(self, dropping, function):
        dropping.left = 1_000_000
        with pytest.raises(StorageError) as refused:
            function("dropping://log/a.parquet")
        assert str(refused.value) == "dropping://log/a.parquet: no connection (ClientError: server disconnected); check the network"

    def test_a_missing_file_is_missing(self, dropping):
        assert not is_there("dropping://log/x.parquet") and not is_there("dropping://nowhere/*.parquet")
        with pytest.raises(InputError, match=r"^no such file: dropping://log/ab\.parquet \(did you mean 'a\.parquet'\?\)$"):
            open_input("dropping://log/ab.parquet")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[int]:
    """The port of an http server with the files under log/."""
    for name in FILES:
        (tmp_path / "log" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "log" / name).write_bytes(bytes(200_000))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def test_http_is_listed_and_refused_in_one_line(site: int) -> None:
    pytest.importorskip("aiohttp", reason="fsspec's http needs it, Triptych does not")
    proxy = CuttingProxy(site)
    root = f"http://127.0.0.1:{proxy.port}/log"
    for pattern, expected in (
        ("**/*.parquet", FILES),
        ("*.parquet", FILES[:1]),
        ("day/b.parquet", FILES[1:2]),
        ("*/*/c.parquet", FILES[2:]),
    ):
        for drops in (0, 3):
            proxy.cut(drops)
            assert find_files(root, pattern) == [f"{root}/{name}" for name in expected]
    with pytest.raises(InputError, match=rf"^no such file: {root}/x\.csv$"):
        find_files(root, "x.csv")
    with pytest.raises(pa.ArrowInvalid, match="range requests"):
        with_retries(root, lambda: open_input(f"{root}/a.parquet").read_at(10, 100_000))
    proxy.cut(1_000_000)
    with pytest.raises(InputError, match=rf"^{root}/a\.parquet: no connection \("):
        open_input(f"{root}/a.parquet")
    proxy.close()
