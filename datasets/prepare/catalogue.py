"""The public logs that `triptych prepare` knows, by name.

prepare("census", Path("downloads/census"), Path("data/census"), progress=lambda done, total: None)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..schema import InputError, nearest
from . import aliccp, aliexpress, census, kuairand
from .text import Progress


class Log(NamedTuple):
    """A public log: what it is, in a line, and what turns it into parquet."""

    description: str
    prepare: Callable[[Path, Path, Progress], dict[str, int]]


LOGS = {
    "kuairand": Log("KuaiRand-Pure, short videos: click, long view, play time; 1.4 million rows", kuairand.prepare),
    "aliccp": Log("Ali-CCP, Taobao: click, purchase; 42 million rows to train on, as many to test on", aliccp.prepare),
    "aliexpress": Log("AliExpress search in MTReclib's form: click, purchase; one or more countries", aliexpress.prepare),
    "census": Log("UCI Census-Income (KDD): income, marriage, education; 300,000 rows", census.prepare),
}


def prepare(name: str, source: Path, out: Path, progress: Progress) -> dict[str, int]:
    """Turn a raw log in its official layout into parquet files of our schema.

    Args:
        name: one of LOGS.
        source: folder of the raw files.
        out: folder to write; its files get their names when all are whole.
        progress: told bytes read and bytes in all.
    Returns:
        rows of each file written.
    Raises:
        InputError: an unknown name, missing files, wrong columns or a broken line: names the file and the line.
    """
    if name not in LOGS:
        raise InputError(f"no such log: {name}{nearest(name, LOGS)}; known are {', '.join(LOGS)}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; prepare writes a folder")
    return LOGS[name].prepare(source, out, progress)
