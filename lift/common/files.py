"""Reading and writing on disk: atomic writes, content hashes, folders that exist only when complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lift.common.errors import UserError

WORK_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on an error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{WORK_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it takes the place of `path`, on an error it is removed.

    A reader therefore sees either the old folder, or none, or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{WORK_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, what: str = "file") -> Any:
    """Raises UserError when `path` is missing or is not JSON; `what` names its role in the message."""
    require_file(path, what)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected {what} in JSON, but it cannot be read: {error}") from error


def read_jsonl(path: Path, what: str = "file") -> list[Any]:
    """Raises UserError when `path` is missing or one of its lines is not JSON."""
    require_file(path, what)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: expected one JSON object a line ({what}): {error}") from error
    return rows


def require_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: expected {what}, but there is no such file. Check the path.")
    return path


def require_folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: expected {what}, but there is no such folder. Check the path.")
    return path


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_folder(path: Path) -> str:
    """Hash over the relative names and contents of all files below `path`, independent of their order on disk."""
    lines = [f"{file.relative_to(path).as_posix()} {sha256_file(file)}" for file in path.rglob("*") if file.is_file()]
    return sha256_text("\n".join(sorted(lines)))
