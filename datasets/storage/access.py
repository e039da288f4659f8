"""Files anywhere: a local path, or a URL of any storage. Found, measured, opened, and tried again when a connection drops."""

from __future__ import annotations

import logging
import os
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as fs

from ..schema import InputError, nearest
from .filesystems import CREDENTIALS, OPTIONS, Place, check_scheme, is_url, parse, place_of

TRIES = 5
FIRST_WAIT_SECONDS = 0.25
"""Before the second try; doubles with each further one, less up to a half by chance, so that ranks do not return all at once."""

_DENIED = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID"
    r"|EXPIRED_TOKEN|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|\b40[13]\b"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket\s+not found")
_NO_CONNECTION = re.compile(r"NETWORK_CONNECTION|CURL error|[Cc]onnect")
_DAMAGED = re.compile(r"checksum|thrift|[Cc]orrupt|flatbuffer|\b[Pp]age\b|ZSTD|Parquet schema")
"""What Arrow says, also as OSError, of a damaged file: reading it again would not help."""

_logger = logging.getLogger(__name__)
_jitter = random.Random()  # of its own: retries must not shift the random numbers of training
T = TypeVar("T")


class StorageError(InputError):
    """The storage behind a URL cannot be reached, or denies us: no fault of the file, which must not be skipped as a bad one."""


def absolute(root: str) -> str:
    """A local path, or file:// URL -> an absolute path; another URL -> the same, normalised. Opens no connection.

    Raises:
        InputError: credentials in the URL (they are not repeated), an unknown scheme or option, a client package that is not installed.
    """
    if not is_url(root):
        return str(Path(root).expanduser().resolve())
    url = parse(root)
    if url.scheme == "file":
        return str(Path(url.path).resolve())
    check_scheme(url)
    path = posixpath.normpath(f"/{url.path.lstrip('/')}").rstrip("/")
    return url.origin + path + url.query


def is_there(pattern: str) -> bool:
    """Whether a file or folder has this name, or a glob matches any.

    Raises:
        StorageError: not allowed to look, or not reached.
    """
    return bool(_matches(*_locate("", pattern)))


def find_files(root: str | Path, pattern: str) -> list[str]:
    """Parquet files of a file name, folder or glob, sorted, as full names; relative to `root`, unless absolute or a URL itself.

    Of a folder, all *.parquet at any depth. Names that begin with `.` or `_`, such as _SUCCESS, are found only where the pattern says so.

    Raises:
        InputError: nothing there.
        StorageError: not allowed to look, or not reached.
    """
    place, parts = _locate(str(root), pattern)
    matches = _matches(place, parts)
    found: set[str] = set()
    listed = ""
    for match in sorted(matches, key=lambda info: f"{info.path}/"):
        if match.type != fs.FileType.Directory:
            found.add(match.path)
        elif not listed or not f"{match.path}/".startswith(listed):
            listed = f"{match.path}/"
            inside = entries(place, match.path, recursive=True)
            found.update(i.path for i in inside if i.is_file and _fits(_parts(i.path[len(match.path) :]), ["**", "*.parquet"]))
    if found:
        return sorted(place.below(path) for path in found)
    name = place.below("/".join([place.path, *parts]))
    if matches:
        raise InputError(f"{name}: a folder without parquet files")
    raise _not_found(name)


def open_input(name: str) -> pa.NativeFile:
    """An open file for reading at any position, from several threads.

    Raises:
        InputError: not there.
        StorageError: not allowed, or not reached.
    """
    place = place_at(name)
    return reach(name, lambda: place.files.open_input_file(place.path))


def with_retries(name: str, action: Callable[[], T]) -> T:
    """`action()`, again after a pause where it raises OSError and `name` is a URL; not where a file is missing, denied or damaged.

    Raises:
        Exception: that of the last try, as it is.
    """
    tries = TRIES if is_url(name) else 1
    for number in range(1, tries):
        try:
            return action()
        except OSError as error:
            if _is_final(error):
                raise
            wait = FIRST_WAIT_SECONDS * 2 ** (number - 1) * _jitter.uniform(0.5, 1)
            _logger.warning("%s: %s; try %d of %d in %.1f s", name, _gist(error), number + 1, tries, wait)
            time.sleep(wait)
    return action()


def _is_final(error: OSError) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    return any(_says(error, what) for what in (_DENIED, _NO_BUCKET, _DAMAGED))


def _says(error: Exception, what: re.Pattern[str]) -> bool:
    """Whether an error's message says so, outside of the names that it quotes."""
    return what.search(re.sub(r"'[^']*'", "", str(error))) is not None


def _gist(error: Exception) -> str:
    """The part of an error that says why, on one short line."""
    text = str(error).strip().partition(" error_info=")[0] or type(error).__name__
    for lead_in in ("Details: ", "with a last message of ", "error message was: "):
        text = text.rpartition(lead_in)[2]
    return text.splitlines()[0][:200]


def reach(name: str, action: Callable[[], T]) -> T:
    """What the action makes of a storage, which is tried again where that may help. Raises InputError, in one line that names it."""
    with _in_one_line(name):
        return with_retries(name, action)


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """A failure becomes an InputError that says what to check."""
    try:
        yield
    except FileNotFoundError:
        raise _not_found(name) from None
    except (OSError, pa.ArrowException) as error:
        kind = StorageError if is_url(name) and isinstance(error, OSError) else InputError
        raise kind(f"{name}: {_explain(name, error)}") from error


def _explain(name: str, error: Exception) -> str:
    if not is_url(name):
        return _gist(error)
    url = parse(name)
    if isinstance(error, PermissionError) or _says(error, _DENIED):
        hint = f" in the environment ({CREDENTIALS[url.scheme]})" if url.scheme in CREDENTIALS else ""
        return f"access denied; check the credentials{hint}, and that they may read and list this place, and write what a run leaves there"
    if _says(error, _NO_BUCKET):
        return f"no such bucket: {url.origin}"
    if isinstance(error, ConnectionError | TimeoutError) or _says(error, _NO_CONNECTION):
        hint = {"s3": ", AWS_ENDPOINT_URL and the region", "gs": " and GOOGLE_APPLICATION_CREDENTIALS"}.get(url.scheme, "")
        return f"no connection ({_gist(error)}); check the network{hint}"
    if url.scheme in ("hdfs", "viewfs"):
        return f"{_gist(error)}; Hadoop's client needs JAVA_HOME, HADOOP_HOME and CLASSPATH"
    return _gist(error)


def _not_found(name: str) -> InputError:
    """What to raise for a name that is not there: names the bucket if it is the bucket, else the nearest neighbour."""
    place = place_at(name)
    if is_url(name) and (url := parse(name)).scheme in OPTIONS:
        bucket = reach(name, lambda: place.files.get_file_info(url.authority))
        if bucket.type == fs.FileType.NotFound:
            return InputError(f"{name}: no such bucket: {url.origin}")
    folder, _, last = place.path.rpartition("/")
    siblings = [_last(info.path) for info in entries(place, folder or ("/" if place.path.startswith("/") else "."))]
    return InputError(f"no such file: {name}{nearest(last, siblings)}")


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _has_magic(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _name_fits(name: str, part: str) -> bool:
    """One component of a path. Hidden names, and those like _SUCCESS, fit only a pattern that begins as they do."""
    return (name[0] not in "._" or name[0] == part[0]) and fnmatchcase(name, part)


def _fits(names: list[str], parts: list[str]) -> bool:
    """Whether the components of a path fit those of a pattern; `**` stands for any number of folders, and at the end for files too."""
    if not parts:
        return not names
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (bool(names) and names[0][0] not in "._" and _fits(names[1:], parts))
    return bool(names) and _name_fits(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _locate(root: str, pattern: str) -> tuple[Place, list[str]]:
    """The place that a pattern is relative to, and the pattern's components."""
    if is_url(pattern) and (url := parse(pattern)).scheme != "file":
        return place_at(f"{url.origin}{url.query}"), _parts(url.path)
    if is_url(pattern) or pattern.startswith("/"):
        return place_at("/"), _parts(parse(pattern).path if is_url(pattern) else pattern)
    return place_at(root or "."), _parts(pattern)


def _matches(place: Place, parts: list[str]) -> list[fs.FileInfo]:
    """What has exactly this name, or else fits it as a glob: files and folders. Lists no more than the pattern needs."""
    exact = "/".join([place.path.rstrip("/"), *parts]) if parts else place.path
    name = place.below(exact)
    info = reach(name, lambda: place.files.get_file_info(exact))
    if info.type != fs.FileType.NotFound:
        return [info]
    if not any(map(_has_magic, parts)):
        return []
    folders = [place.path]
    for position, part in enumerate(parts):
        if part == "**":
            inside = [(folder, info) for folder in folders for info in entries(place, folder, recursive=True)]
            return [info for folder, info in inside if _fits(_parts(info.path[len(folder) :]), parts[position:])]
        if _has_magic(part):
            found = [info for folder in folders for info in entries(place, folder) if _name_fits(_last(info.path), part)]
            if position == len(parts) - 1:
                return found
            folders = [info.path for info in found if info.type == fs.FileType.Directory]
        else:
            folders = [f"{folder.rstrip('/')}/{part}" for folder in folders]
    return [info for info in reach(name, lambda: place.files.get_file_info(folders)) if info.type != fs.FileType.NotFound]


def entries(place: Place, folder: str, recursive: bool = False) -> list[fs.FileInfo]:
    """What is in a folder, or anywhere below it; nothing where it is not there."""
    is_local = isinstance(place.files, fs.LocalFileSystem)
    step_by_step = is_local or isinstance(place.files, fs.PyFileSystem)
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=recursive and not step_by_step)
    found: list[fs.FileInfo] = reach(place.below(folder), lambda: _unless_a_file(place.files, selector))
    if not (recursive and step_by_step):
        return found
    # A link to a folder above would lead through the same files again and again.
    inner = [info.path for info in found if info.type == fs.FileType.Directory and not (is_local and _leads_back(info.path))]
    return found + [info for path in inner for info in entries(place, path, recursive=True)]


def _unless_a_file(files: fs.FileSystem, selector: fs.FileSelector) -> list[fs.FileInfo]:
    try:
        return list(files.get_file_info(selector))
    except NotADirectoryError:
        return []


def _leads_back(folder: str) -> bool:
    target, here = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.islink(folder) and os.path.commonpath([target, here]) == target


def place_at(name: str) -> Place:
    """A file system, and the path of this file or URL in it. Raises InputError."""
    with _in_one_line(name):
        return place_of(name)
