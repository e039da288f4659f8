"""A folder at a URL: what is in it, and files brought there and back. What fails is one line that names the URL."""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as fs

from ...datasets.schema import InputError
from ...datasets.storage.access import StorageError, absolute, entries, open_input, place_at, reach
from ...datasets.storage.filesystems import is_url, parse
from ..faults.stages import stage
from ..writing import check_file

BLOCK_BYTES = 8 << 20
"""Of one request that reads."""
WRITING = ".writing"
"""End of the names of files at a URL that are not whole yet."""
AT_A_TIME = 4
"""Files on their way, of one rank."""
FETCHING = ".fetching"
"""End of the names of local files that are not whole yet."""
T = TypeVar("T")
R = TypeVar("R")


class RemoteFolder:
    """A folder at a URL. Names are relative to it, and `/` separates folders.

    Raises:
        InputError: from any method: the storage cannot be reached or refuses (StorageError), or the URL is none.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self._root = place_at(self.url)
        # Others have no folders, but names with slashes; making one would leave an empty object.
        self._has_folders = not isinstance(self._root.files, fs.S3FileSystem | fs.GcsFileSystem)

    def url_of(self, name: str) -> str:
        return self._root.below(self._path(name))

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder; none where it is not there."""
        return [posixpath.basename(info.path.rstrip("/")) for info in self._inside(name) if info.type == fs.FileType.Directory]

    def files(self, name: str, *, without: str | None = None) -> list[str]:
        """The files anywhere below a folder, but not below the folder `without` in it; none where it is not there."""
        found = []
        for info in self._inside(name):
            inner = posixpath.join(name, posixpath.basename(info.path.rstrip("/")))
            if info.is_file:
                found.append(inner)
            elif info.type == fs.FileType.Directory and inner != without:
                found += self.files(inner)
        return sorted(found)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None where there is none."""
        infos = self._reach(names[0], lambda: self._root.files.get_file_info([self._path(name) for name in names])) if names else []
        return [info.size if info.is_file else None for info in infos]

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        if self.sizes([name]) == [None]:
            return None
        with open_input(self.url_of(name)) as file:
            content: bytes = self._reach(name, lambda: file.read_at(file.size(), 0))
        return content

    def fetch(self, name: str, path: Path) -> tuple[int, str]:
        """Bring a file here; it has its name when it is whole. Returns its size in bytes and its SHA-256."""
        stage(f"fetching {self.url_of(name)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside, digest = path.with_name(f"{path.name}.{os.getpid()}{FETCHING}"), hashlib.sha256()
        try:
            with open_input(self.url_of(name)) as file, beside.open("wb") as target:
                size = file.size()
                for begin in range(0, size, BLOCK_BYTES):
                    block = self._reach(name, partial(file.read_at, min(BLOCK_BYTES, size - begin), begin))
                    digest.update(block)
                    target.write(block)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return size, digest.hexdigest()

    def put(self, path: Path, name: str) -> None:
        """Bring a file there; readers see what was there before, or all of it."""

        stage(f"uploading {self.url_of(name)}")
        with path.open("rb") as source, self._replacing(name) as beside:

            def send() -> None:
                source.seek(0)
                with self._root.files.open_output_stream(self._path(beside)) as target:
                    shutil.copyfileobj(source, target, BLOCK_BYTES)

            self._reach(name, send)

    def write(self, content: bytes, name: str) -> None:
        """Write a small file; readers see the old content or the new."""
        with self._replacing(name) as beside:

            def send() -> None:
                with self._root.files.open_output_stream(self._path(beside)) as target:
                    target.write(content)

            self._reach(name, send)

    def move(self, name: str, to: str) -> None:
        """Give a file another name."""
        if self._has_folders:
            self._reach(name, lambda: self._root.files.create_dir(posixpath.dirname(self._path(to)), recursive=True))
        if isinstance(self._root.files, fs.HadoopFileSystem):  # which replaces nothing
            self.delete(to)
        self._reach(name, lambda: self._root.files.move(self._path(name), self._path(to)))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.sizes([name]) != [None]:
            self._reach(name, lambda: _unless_gone(lambda: self._root.files.delete_file(self._path(name))))

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all below it, if it is there."""
        self._reach(name, lambda: _unless_gone(lambda: self._root.files.delete_dir(self._path(name))))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root.path, name) if name else self._root.path

    def _inside(self, name: str) -> list[fs.FileInfo]:
        return self._converted(name, lambda: entries(self._root, self._path(name)))

    @contextmanager
    def _replacing(self, name: str) -> Iterator[str]:
        """The name to write to. What is written to an object store is there when it is whole; other storage is written beside it."""
        if not self._has_folders:
            yield name
            return
        self._reach(name, lambda: self._root.files.create_dir(posixpath.dirname(self._path(name)), recursive=True))
        yield name + WRITING
        self.move(name + WRITING, name)

    def _reach(self, name: str, action: Callable[[], T]) -> T:
        return self._converted(name, lambda: reach(self.url_of(name), lambda: _as_os_error(action)))

    def _converted(self, name: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except StorageError:
            raise
        except InputError as error:  # no such bucket, or not what the storage can do
            raise StorageError(str(error)) from error


def _unless_gone(action: Callable[[], None]) -> None:
    with suppress(FileNotFoundError):
        action()


def _as_os_error(action: Callable[[], T]) -> T:
    """Clients of fsspec fail in ways of their own."""
    try:
        return action()
    except (OSError, InputError):
        raise
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def at_a_time(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results in order; several are worked on at a time."""
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        return list(threads.map(work, items))


def _split(url: str) -> tuple[str, str]:
    """The URL of a folder, and a name in it."""
    parts = parse(absolute(url))
    folder, _, name = parts.path.rpartition("/")
    return f"{parts.origin}{folder}{parts.query}", name


def check_output(out: str) -> None:
    """The file, or what is at the URL, can be written: better known before the work than after it.

    Raises:
        InputError: it cannot.
    """
    if not is_remote(out):
        check_file(local_path(out))
        return
    folder, name = _split(out)
    remote = RemoteFolder(folder)
    if not name:
        raise InputError(f"{out}: no name to write there")
    remote.write(b"", f"{name}.probe")
    remote.delete(f"{name}.probe")


def check_folder(url: str, holds: str) -> None:
    """The folder may be replaced: it is empty, or has a file of this name.

    Raises:
        InputError: it may not.
    """
    found = RemoteFolder(url).files("")
    if found and holds not in found:
        raise InputError(f"{url} is not empty and has no {holds}; choose another --out")


def is_remote(name: str) -> bool:
    """Whether it is a URL, and not of a local file."""
    return is_url(name) and parse(name).scheme != "file"


@contextmanager
def delivered(out: str) -> Iterator[Path]:
    """Where to write what is to be at `out`: there, or where that is a URL beside it on this machine, to be brought there afterwards.

    Raises:
        InputError: it cannot be brought there; it is kept, and named.
    """
    if not is_remote(out):
        yield local_path(out)
        return
    scratch = Path(tempfile.mkdtemp(prefix="triptych_out_"))
    path = scratch / _split(out)[1]
    yield path
    try:
        deliver(path, out)
    except InputError as error:
        raise InputError(f"{error}; what was made is kept in {path}") from error
    shutil.rmtree(scratch)


def deliver(path: Path, out: str) -> None:
    """Bring a file, or a folder whose former content is deleted, to a URL."""
    folder, name = _split(out)
    remote = RemoteFolder(folder)
    if path.is_file():
        remote.put(path, name)
        return
    remote.delete_folder(name)
    files = sorted(inner for inner in path.rglob("*") if inner.is_file())
    at_a_time(lambda inner: remote.put(inner, f"{name}/{inner.relative_to(path).as_posix()}"), files)


def local_path(name: str) -> Path:
    """Of a path, or a file:// URL."""
    return Path(absolute(name)) if is_url(name) else Path(name)
