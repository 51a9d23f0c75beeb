"""Files of data sources, on this machine or behind an fsspec URL (`s3://`, `hf://`, ...): listing, reading, fingerprints.

Paths are strings, since a URL is no `Path`. Local files are read by offset through a small cache of open files; remote ones
by ranges, many at once where the file system can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import fsspec

from lift.common.errors import UserError
from lift.common.files import require_file, sha256_text

OPEN_FILES = 256
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a remote read is tried again."""


def is_remote(path: str) -> bool:
    return "://" in path


def list_files(path: str, suffix: str, what: str) -> list[str]:
    """`path` itself when it is a file, else the files below it that end with `suffix`, sorted.

    Raises:
        UserError: nothing is there, or the file system of a URL cannot be reached or needs a package.
    """
    if not is_remote(path):
        if not Path(path).is_dir():
            return [str(require_file(Path(path), what))]
        found = sorted(str(file) for file in Path(path).glob(f"*{suffix}"))
    elif path.endswith(suffix):
        return [path]
    else:
        filesystem, inner = _filesystem(path)
        with _remote_faults(path):
            filesystem.invalidate_cache()  # an earlier listing may be out of date
            found = sorted(filesystem.unstrip_protocol(file) for file in filesystem.glob(f"{inner.rstrip('/')}/*{suffix}"))
    if not found:
        raise UserError(f"{path}: expected {what} (*{suffix}), found none. Check the path.")
    return found


def remote_names(folder: str) -> set[str]:
    """Names of the files in a folder behind a URL."""
    filesystem, inner = _filesystem(folder)
    with _remote_faults(folder):
        return {str(path).rstrip("/").rpartition("/")[2] for path in filesystem.ls(inner, detail=False)}


def open_file(path: str) -> IO[bytes]:
    if not is_remote(path):
        return Path(path).open("rb")
    filesystem, inner = _filesystem(path)
    with _remote_faults(path):
        return filesystem.open(inner, "rb")


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """`size` bytes at `offset` of each (path, offset, size), the whole file when the size is -1.

    Remote ones of one file system are asked for together, which hides their latency.

    Raises:
        OSError: a file cannot be read, or is shorter.
    """
    found: list[bytes] = [b""] * len(ranges)
    remote: dict[Any, list[int]] = {}
    for number, (path, offset, size) in enumerate(ranges):
        if is_remote(path):
            remote.setdefault(_filesystem(path)[0], []).append(number)
        elif size < 0:
            found[number] = Path(path).read_bytes()
        else:
            file = _opened(path, os.getpid())  # held, because in another thread it may leave the cache, which closes it
            found[number] = os.pread(file.fileno(), size, offset)
    for filesystem, numbers in remote.items():
        paths = [filesystem._strip_protocol(ranges[number][0]) for number in numbers]
        starts = [ranges[number][1] for number in numbers]
        ends = [None if ranges[number][2] < 0 else ranges[number][1] + ranges[number][2] for number in numbers]
        for number, content in zip(numbers, _fetch(filesystem, paths, starts, ends), strict=True):
            found[number] = content
    for (path, offset, size), content in zip(ranges, found, strict=True):
        if size >= 0 and len(content) != size:
            raise OSError(f"{path}: expected {size} bytes at byte {offset}, found {len(content)}; the file has changed")
    return found


def _fetch(filesystem: Any, paths: list[str], starts: list[int], ends: list[int | None]) -> list[bytes]:
    """Tries again what a network may mend, and raises OSError for what it does not, whatever the file system calls it."""
    for pause in (*PAUSES, None):
        try:
            return filesystem.cat_ranges(paths, starts, ends, on_error="raise")
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol's client has exceptions of its own
            if pause is None:
                raise OSError(f"{paths[0]} and {len(paths) - 1} others: {type(error).__name__}: {error}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def fingerprint(path: str) -> str:
    """Changes when the file does: size and modification time here, what the file system vouches for on a remote one."""
    if not is_remote(path):
        stat = Path(path).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    filesystem, inner = _filesystem(path)
    with _remote_faults(path):
        # not ukey(), which over HTTP is the URL alone
        return sha256_text(str(sorted((name, str(value)) for name, value in filesystem.info(inner).items())))


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, process: int) -> IO[bytes]:
    """An open file is closed when it leaves the cache. A forked process opens its own."""
    return Path(path).open("rb")


def _filesystem(url: str) -> tuple[Any, str]:
    with _remote_faults(url):
        filesystem, inner = fsspec.core.url_to_fs(url)
    return filesystem, inner


class _remote_faults:
    """Turns what a remote file system raises when it is set up or listed into one message."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ImportError, ValueError)):
            raise UserError(
                f"{self.url}: cannot be reached: {type(error).__name__}: {error}. Check the URL, the credentials, and that the "
                "fsspec package of its protocol is installed."
            ) from error
