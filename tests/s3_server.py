"""An S3 server on loopback in a process of its own, and a TCP proxy that cuts connections."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs as fs
import pytest

START_SECONDS = 60
BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
SERVE = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the S3 server ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"no S3 server on port {port} after {START_SECONDS} s")


@contextmanager
def serve_s3(*, denies: bool = False) -> Iterator[int]:
    """The port of a fresh server with an empty bucket; if it `denies`, nobody may read it."""
    port = free_port()
    env = {**os.environ, **ENVIRONMENT}
    if denies:
        env["INITIAL_NO_AUTH_ACTION_COUNT"] = "2"  # what making the bucket takes
    command = [sys.executable, "-c", SERVE.format(port=port)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, port)
        client(port, allow_bucket_creation=True).create_dir(BUCKET)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def client(port: int, **options: bool) -> fs.FileSystem:
    """A filesystem for putting objects, apart from the code under test."""
    keys = {"access_key": ENVIRONMENT["AWS_ACCESS_KEY_ID"], "secret_key": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]}
    return fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", region=ENVIRONMENT["AWS_REGION"], **keys, **options)


def upload(port: int, folder: Path, prefix: str) -> None:
    """Put every file below a folder into the bucket, under the prefix."""
    s3 = client(port)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with s3.open_output_stream(f"{BUCKET}/{prefix}/{path.relative_to(folder)}") as out:
                out.write(path.read_bytes())


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let this test's process, and those it starts, find the server through the environment alone."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)


class CuttingProxy:
    """Passes connections on to a port, but cuts the next `cuts` of them after `bytes_before` bytes of the answer.

    Each connection serves one request, so that every request counts. A cut is a reset, as of a crashed peer, or a plain end.
    """

    def __init__(self, upstream: int) -> None:
        self.cuts = 0
        self.bytes_before = 0
        self.reset = True
        self.connections = 0
        self._upstream = upstream
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, cuts: int, bytes_before: int = 0, *, reset: bool = True) -> None:
        with self._lock:
            self.cuts, self.bytes_before, self.reset, self.connections = cuts, bytes_before, reset, 0

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, connection: socket.socket) -> None:
        # A client that has read enough may close first.
        with suppress(OSError), connection, socket.create_connection(("127.0.0.1", self._upstream)) as server:
            request = _read_head(connection)
            if not request:
                return
            with self._lock:
                self.connections += 1
                allowed = self.bytes_before if self.cuts > 0 else sys.maxsize
                self.cuts -= 1
            server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            while allowed > 0 and (answer := server.recv(min(65536, allowed))):
                connection.sendall(answer)
                allowed -= len(answer)
            if allowed == 0 and self.reset:
                # Closing with a linger of nought sends a reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def _read_head(connection: socket.socket) -> bytes:
    """A request without a body: the reading side sends no others."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = connection.recv(65536)
        if not piece:
            return b""
        head += piece
    return head
