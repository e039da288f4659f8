"""Reading from an S3 server: what goes wrong on the way, and a training that does not notice where its log lies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import ROOT, succeeds
from tests.s3_server import BUCKET, CuttingProxy, free_port, serve_s3, upload, use
from tests.small import write_log
from triptych.datasets.schema import InputError
from triptych.datasets.storage import access as storage
from triptych.datasets.storage import filesystems
from triptych.datasets.storage.access import StorageError, find_files, is_there, open_input, with_retries

TIMEOUT_SECONDS = 180
TABLE = pa.table({"user": [f"user {i * 7919 % 10007}" for i in range(80_000)], "price": [i / 3 for i in range(80_000)]})
GROUP_ROWS = 20_000
LOG = f"s3://{BUCKET}/log"
FILE = f"{LOG}/a.parquet"
READ_ON_WHILE_ENDING = """
import sys, threading
import pyarrow.parquet as pq
from triptych.datasets.storage.access import open_input
started = threading.Barrier(4)
def read():
    file = pq.ParquetFile(open_input(sys.argv[1]), pre_buffer=True)
    file.read_row_group(0)
    started.wait()
    while True:
        file.read_row_group(1)
for _ in range(3):
    threading.Thread(target=read, daemon=True).start()
left_open = open_input(sys.argv[1])
started.wait()
print("ending")
sys.exit(3)
"""


def refusal(function: Callable[..., object], *args: object, kind: type[InputError] = InputError) -> str:
    with pytest.raises(InputError) as refused:
        function(*args)
    assert refused.type is kind and "\n" not in str(refused.value)
    return str(refused.value)


def all_refusals(name: str) -> list[str]:
    functions = (lambda name: find_files(LOG, name), is_there, open_input)
    return [refusal(function, name, kind=StorageError) for function in functions]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server with one parquet file of four row groups, in which every row group is larger than any cut below."""
    folder = tmp_path_factory.mktemp("log")
    pq.write_table(TABLE, folder / "a.parquet", GROUP_ROWS, compression="zstd", write_page_checksum=True)
    with serve_s3() as port:
        upload(port, folder, "log")
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(server)
    use(monkeypatch, proxy.port)
    yield proxy
    proxy.close()


class TestRefusals:
    def test_no_such_key_and_no_such_bucket(self, server: int, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, server)
        assert refusal(find_files, LOG, "b.parquet") == f"no such file: {LOG}/b.parquet (did you mean 'a.parquet'?)"
        assert refusal(find_files, "s3://nothing", "*.parquet") == "s3://nothing/*.parquet: no such bucket: s3://nothing"
        assert refusal(open_input, "s3://nothing/a.parquet") == "s3://nothing/a.parquet: no such bucket: s3://nothing"
        assert not is_there("s3://nothing/log")

    def test_denied(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        with serve_s3(denies=True) as port:
            use(monkeypatch, port)
            for name in (FILE, f"{LOG}/*.parquet"):
                for message in all_refusals(name):
                    assert message.startswith(f"{name}: access denied; check the credentials in the environment (AWS_ACCESS_KEY_ID")
        assert not caplog.records

    def test_nothing_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        port = free_port()
        use(monkeypatch, port)
        start = time.monotonic()
        for message in all_refusals(FILE):
            assert message.startswith(f"{FILE}: no connection (") and str(port) in message and "AWS_ENDPOINT_URL" in message
        assert time.monotonic() - start < 20

    def test_a_server_that_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "TRIES", 2)
        monkeypatch.setattr(filesystems, "SILENT_SECONDS", 1.0)
        with socket.create_server(("127.0.0.1", 0)) as mute:
            use(monkeypatch, mute.getsockname()[1])
            start = time.monotonic()
            assert refusal(find_files, LOG, "a.parquet", kind=StorageError).startswith(f"{FILE}: no connection (")
            assert time.monotonic() - start < 20

    def test_the_url_may_name_the_server(self, server: int, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, free_port())
        options = f"?endpoint_override=127.0.0.1:{server}&scheme=http"
        assert find_files(LOG + options, "*.parquet") == find_files(".", LOG + options) == [FILE + options]
        assert open_input(FILE + options).size() == len(open_input(FILE + options).read())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server}/")
        assert find_files(LOG, "*.parquet") == [FILE]


class TestDroppedConnections:
    @pytest.mark.parametrize("pre_buffer", [False, True])
    @pytest.mark.parametrize(("bytes_before", "reset"), [(0, True), (0, False), (100, True), (20_000, True), (20_000, False)])
    def test_reading_goes_on_where_it_was(
        self, proxy: CuttingProxy, bytes_before: int, reset: bool, pre_buffer: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = pq.ParquetFile(open_input(FILE), page_checksum_verification=True, pre_buffer=pre_buffer)
        proxy.cut(3, bytes_before, reset=reset)
        for group in range(4):
            rows = with_retries(FILE, lambda group=group: file.read_row_group(group, use_threads=False))  # type: ignore[misc]
            assert rows.equals(TABLE.slice(group * GROUP_ROWS, GROUP_ROWS))
        assert proxy.cuts <= 0 and proxy.connections >= 7
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["s3"] * 3

    @pytest.mark.parametrize("bytes_before", [0, 20_000])
    def test_reading_the_same_over_http_goes_on(self, proxy: CuttingProxy, bytes_before: int) -> None:
        pytest.importorskip("aiohttp", reason="fsspec's http needs it, Triptych does not")
        url = f"http://127.0.0.1:{proxy.port}/{BUCKET}/log/a.parquet"
        file = pq.ParquetFile(open_input(url), page_checksum_verification=True)
        for group in range(4):
            proxy.cut(3, bytes_before)
            rows = with_retries(url, lambda group=group: file.read_row_group(group))  # type: ignore[misc]
            assert rows.equals(TABLE.slice(group * GROUP_ROWS, GROUP_ROWS))

    def test_opening_and_finding_go_on(self, proxy: CuttingProxy) -> None:
        for function, args, expected in (
            (find_files, (LOG, "."), [FILE]),
            (find_files, (LOG, "*.parquet"), [FILE]),
            (is_there, (FILE,), True),
        ):
            proxy.cut(2)
            assert function(*args) == expected and proxy.connections > 2
        proxy.cut(2)
        assert pq.read_table(open_input(FILE)).equals(TABLE)

    @pytest.mark.parametrize("bytes_before", [0, 100])
    def test_endless_cuts_end_in_one_line(self, proxy: CuttingProxy, bytes_before: int) -> None:
        open_file = open_input(FILE)
        proxy.cut(1_000_000, bytes_before)
        for message in all_refusals(FILE):
            assert message.startswith(f"{FILE}: no connection (")
        proxy.cut(1_000_000, bytes_before)
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            with_retries(FILE, lambda: open_file.read_at(1000, 0))
        assert proxy.connections == storage.TRIES

    def test_threads_share_the_connection(self, proxy: CuttingProxy) -> None:
        def read(number: int) -> pa.Table:
            file = pq.ParquetFile(open_input(FILE))
            return with_retries(FILE, lambda: file.read_row_group(number % 4))

        proxy.cut(3)
        with ThreadPoolExecutor(8) as pool:
            for number, rows in enumerate(pool.map(read, range(24))):
                assert rows.equals(TABLE.slice(number % 4 * GROUP_ROWS, GROUP_ROWS))


def test_a_process_that_ends_while_it_reads_ends_as_it_should(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, server)
    command = [sys.executable, "-c", READ_ON_WHILE_ENDING, FILE]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=env, check=False)
    assert (done.returncode, done.stdout) == (3, "ending\n"), done.stderr


def losses(run: Path) -> list[dict[str, object]]:
    """What a run learned, step by step, without what differs between two runs of the same."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in ("step", "loss") if key in record} for record in records]


def test_a_training_from_s3_equals_one_from_disk(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, server)
    recipe = write_log(tmp_path / "log")
    upload(server, tmp_path / "log", "small")
    roots = {"disk": str(tmp_path / "log"), "s3": f"s3://{BUCKET}/small?endpoint_override=127.0.0.1:{server}&scheme=http"}
    for name, root in roots.items():
        succeeds("train", "--recipe", recipe, "--run", tmp_path / name, "--ranks", 2, "--set", f"data.root={root}")
    assert len(losses(tmp_path / "disk")) > 2 and losses(tmp_path / "disk") == losses(tmp_path / "s3")
    result_disk, result_s3 = (json.loads((tmp_path / name / "result.json").read_text()) for name in roots)
    assert result_disk["tasks"] == result_s3["tasks"]
