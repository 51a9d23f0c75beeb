"""Reading and writing on disk: atomic writes, content hashes, folders that exist only when complete."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lift.common.errors import UserError

WORK_SUFFIX = ".partial"
LOCK_FILE = ".lock"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on an error removed."""
    with working_file(path) as temporary:
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)


@contextmanager
def working_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for the caller to rename; what is left of it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Keeps `path` (made when it is not there) for this process alone, and sweeps what killed writers of files left in it.

    The lock goes with the process, however that ends. Its empty file stays: the folder looks the same after a kill.

    Raises:
        UserError: another process, on any machine that shares the file system, holds the folder.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another job is writing there. Wait for its end, or choose another folder.") from error
        sweep(path)
        yield


def sweep(path: Path) -> None:
    """Removes unfinished files in `path`; only for the one who holds the folder, with no writer at work."""
    for left in path.glob(f"*{WORK_SUFFIX}"):
        if not left.is_dir():  # `atomic_folder` sweeps its own
            left.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it takes the place of `path`, on an error it is removed.

    A reader therefore sees either the old folder, or none, or the complete new one. What killed processes left is swept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.{_host()}-*{WORK_SUFFIX}"):
        process = left.name.removeprefix(f"{path.name}.{_host()}-").partition("-")[0]
        if left.is_dir() and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(left)
    temporary, replaced = _unfinished(path), _unfinished(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
    finally:
        for folder in (temporary, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def _unfinished(path: Path) -> Path:
    """A name beside `path` that no other process has, on whatever machine that shares the file system."""
    return path.with_name(f"{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{WORK_SUFFIX}")


def _host() -> str:
    return platform.node().replace(".", "_") or "localhost"


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_output_folder(path: Path, marker: str) -> None:
    """Raises UserError when `path` cannot be made, or holds something other than an earlier result, with the file `marker`."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{path}: cannot be made: {above} is no folder that can be written to. Choose another --out.")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / marker).is_file()):
        raise UserError(
            f"{path}: expected a new folder or an earlier result (with {marker}), found other files. Choose another --out."
        )


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, what: str = "file", make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Raises UserError when `path` is missing or is not JSON; `what` names its role in the message.

    Args:
        make_object: of the keys and values of each JSON object, also of those that occur twice; a dict when not given.
    """
    require_file(path, what)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=make_object)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: expected {what} in JSON, but it cannot be read: {error}") from error


def read_jsonl(path: Path, what: str = "file") -> list[Any]:
    """Raises UserError when `path` is missing or one of its lines is not JSON."""
    require_file(path, what)
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected {what} as JSON lines in UTF-8: {error}") from error
    # not splitlines(), which also breaks at characters that JSON leaves as they are inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{path}:{number}: expected one JSON object a line ({what}): {error}") from error
    return rows


def read_whole_rows(path: Path) -> list[Any]:
    """Rows of a JSON-lines file that grows and whose last line may have been cut by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
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
    return sha256_bytes(text.encode("utf-8", errors="surrogatepass"))


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_folder(path: Path, leave_out: Path | None = None) -> str:
    """Hash over the relative names and contents of all files below `path` but one, independent of their order on disk."""
    files = [file for file in path.rglob("*") if file.is_file() and file != leave_out]
    lines = [f"{file.relative_to(path).as_posix()} {sha256_file(file)}" for file in files]
    return sha256_text("\n".join(sorted(lines)))
