"""Which filesystem a name belongs to: a local path, or a URL of a pyarrow or fsspec filesystem; checked, and never with credentials in it.

    s3://bucket/log                                           credentials, region and AWS_ENDPOINT_URL from the environment
    s3://bucket/log?endpoint_override=host:9000&scheme=http   an S3 server of one's own
    gs://bucket/log  hdfs://namenode:8020/log  file:///data/log
    memory://log  https://host/log  az://container/log        and all else that fsspec knows, given its client package

Names in URLs are literal: nothing is percent-decoded, and a `?` followed by `key=` begins the options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as fs

from ..schema import InputError, nearest

CONNECT_SECONDS = 2.0
SILENT_SECONDS = 3.0
"""A server that sends nothing for as long is given up."""
CLIENT_ATTEMPTS = 1
"""Of the S3 client for one request. Trying again is `access.with_retries`' part, which says so in the log."""

OPTIONS = {"s3": ("region", "scheme", "endpoint_override", "anonymous"), "gs": ("scheme", "endpoint_override", "anonymous")}
OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
COMMON_SCHEMES = ("s3", "gs", "hdfs", "file", "http", "https", "memory", "az", "abfs", "sftp")
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Where a scheme's client looks for credentials: environment variables."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<authority>[^/?]*)(?P<path>.*?)(?P<query>\?[\w.-]+=[^?]*)?", re.DOTALL)
_HOST = re.compile(r"(?P<user>[^@:]+@)?(\[[\da-fA-F:]+\]|[^@:]*)(:\d+)?")
_SECRET = re.compile(r"key|secret|token|passw|pwd|signature|credential|^sig$", re.IGNORECASE)


@dataclass(frozen=True)
class Url:
    """scheme://authority/path?query; the path begins with a slash or is empty, the query with its question mark."""

    scheme: str
    authority: str
    path: str
    query: str

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def options(self) -> dict[str, str]:
        pairs = (option.partition("=") for option in self.query.removeprefix("?").split("&"))
        return {key: value for key, _, value in pairs if key}


@dataclass(frozen=True)
class Place:
    """A file or folder: `path` to its filesystem; to the user, `name` + `query`."""

    files: fs.FileSystem
    path: str
    name: str
    query: str = ""

    def below(self, path: str) -> str:
        """The full name of a path that is this place's or lies below it."""
        return join(self.name, path[len(self.path) :]) + self.query


def join(folder: str, rest: str) -> str:
    """`folder/rest`, where either may be empty, and `.` says nothing."""
    rest = rest.strip("/")
    if folder in ("", ".") or not rest:
        return rest or folder
    return folder + rest if folder.endswith("/") else f"{folder}/{rest}"


def is_url(name: str) -> bool:
    """Whether the name begins with `scheme://`."""
    return re.match(r"[A-Za-z][\w+.-]*://", name) is not None


def parse(name: str) -> Url:
    """A URL's parts.

    Raises:
        InputError: credentials in the URL (they are not repeated), or options that the scheme does not have.
    """
    match = _URL.fullmatch(name)
    assert match is not None, "only what is_url comes here"
    scheme = match["scheme"].lower()
    url = Url(OTHER_NAMES.get(scheme, scheme), match["authority"], match["path"], match["query"] or "")
    host = _HOST.fullmatch(url.authority)
    is_bucket = url.scheme in OPTIONS
    secret_user = host is None or (host["user"] and (is_bucket or url.scheme in ("http", "https")))
    if secret_user or any(_SECRET.search(key) or "@" in value for key, value in url.options.items()):
        where = CREDENTIALS.get(url.scheme, "the variables that its client reads")
        raise InputError(f"{url.scheme}://...: a URL must not hold credentials; put them into the environment ({where})")
    if is_bucket and not re.fullmatch(r"[\w.-]+", url.authority):
        raise InputError(f"{name}: no bucket; write {url.scheme}://BUCKET/FOLDER")
    if url.scheme == "file" and url.authority not in ("", "localhost"):
        raise InputError(f"{name}: files of another host; write file:///FOLDER")
    known = OPTIONS.get(url.scheme, ())
    for option in url.options:
        if option not in known:
            raise InputError(f"{name}: unknown option '{option}'{nearest(option, known)}; {url.scheme}:// has {', '.join(known) or 'none'}")
    return url


def place_of(name: str) -> Place:
    """The filesystem of a name, and the path in it. Filesystems are made once and shared by all threads.

    Raises:
        InputError: as `parse` and `check_scheme`.
        OSError: the storage cannot be reached.
    """
    if not is_url(name):
        path = str(Path(name))
        return Place(_local(), path, path)
    url = parse(name)
    if url.scheme == "file":
        return Place(_local(), url.path, url.path)
    check_scheme(url)
    base = url.origin + url.path.rstrip("/")
    if url.scheme in OPTIONS:
        files = _s3(url) if url.scheme == "s3" else _gcs(url.query)
        return Place(files, (url.authority + url.path).rstrip("/"), base, url.query)
    if url.scheme in ("hdfs", "viewfs"):
        return Place(_hadoop(url.origin), url.path.rstrip("/") or "/", base)
    files, path = fsspec.core.url_to_fs(base)
    return Place(fs.PyFileSystem(_TruthfulHandler(files)), path, base)


def check_scheme(url: Url) -> None:
    """Whether this scheme is known and its client there; opens no connection.

    Raises:
        InputError: names the schemes that work, or the package to install.
    """
    if url.scheme in (*OPTIONS, "hdfs", "viewfs", "file"):
        return
    try:
        fsspec.get_filesystem_class(url.scheme)
    except ValueError as error:
        known = ", ".join(COMMON_SCHEMES)
        hint = nearest(url.scheme, COMMON_SCHEMES)
        raise InputError(f"{url.origin}: unknown scheme '{url.scheme}'{hint}; known are {known}, and what else fsspec knows") from error
    except ImportError as error:
        raise InputError(f"{url.origin}: the client for {url.scheme}:// is not installed: {error}") from error


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


def _s3(url: Url) -> fs.FileSystem:
    options = url.options
    endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and host:
        region = "us-east-1"
    anonymous = options.get("anonymous") == "true"
    return _s3_client(host, options.get("scheme") or scheme or "https", region, None if region else url.authority, anonymous)


@lru_cache(maxsize=64)
def _s3_client(host: str, scheme: str, region: str | None, bucket: str | None, anonymous: bool) -> fs.FileSystem:
    """A client for one endpoint; without a region, for that of the bucket."""
    return fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme,
        region=region or fs.resolve_s3_region(bucket),
        anonymous=anonymous,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS),
    )


@lru_cache(maxsize=64)
def _gcs(query: str) -> fs.FileSystem:
    options = Url("gs", "", "", query).options
    return fs.GcsFileSystem(
        anonymous=options.get("anonymous") == "true",
        scheme=options.get("scheme"),
        endpoint_override=options.get("endpoint_override"),
        retry_time_limit=timedelta(seconds=1),  # 15 minutes unless told
    )


@lru_cache(maxsize=64)
def _hadoop(origin: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(f"{origin}/")[0]


class _TruthfulHandler(fs.FSSpecHandler):
    """pyarrow's way to fsspec, but what went wrong arrives as an OSError. Left alone, a connection that drops reads as a missing file in
    one place, leaves out a folder in another, and elsewhere raises errors of fsspec's clients. Lists one folder at a time."""

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        try:
            with _as_os_error():
                return self._create_file_info(path, self.fs.info(path))
        except FileNotFoundError:
            return fs.FileInfo(path, fs.FileType.NotFound)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        assert not selector.recursive, "fsspec's own recursion leaves out what it cannot list"
        try:
            with _as_os_error():
                found = self.fs.ls(selector.base_dir, detail=True)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        # Of a file, `ls` lists the file.
        inside = (info for info in found if info["name"].strip("/") != selector.base_dir.strip("/"))
        return [self._create_file_info(info["name"], info) for info in inside]

    def open_input_file(self, path: str) -> pa.PythonFile:
        with _as_os_error():
            return pa.PythonFile(_TruthfulFile(self.fs.open(path, mode="rb")), mode="r")


class _TruthfulFile:
    """An fsspec file whose reads fail with OSError alone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        with _as_os_error():
            return self._file.read(size)


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise
        raise ConnectionError(f"{type(cause).__name__}: {cause}") from error
    except OSError:
        raise
    except ValueError as error:  # the storage cannot do it; trying again would not help
        raise pa.ArrowInvalid(str(error)) from error
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
