"""What is read of a benchmark's published files, before it is written; and the checks that all layouts share.

Readers look at texts first and leave the images to the writer: a benchmark's images may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from eval.lmm.tasks.dataset import Table
from lift.common.errors import UserError
from lift.common.files import require_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Published:
    tables: Sequence[Table]
    """The questions' table first; all of one repository."""
    left_out: list[str] = field(default_factory=list)
    """One sentence for each reason why published questions are in no table, with their number."""


@dataclass(frozen=True)
class Source:
    """Where a user says a benchmark is."""

    path: Path
    """The published file or folder."""
    images: Path | None = None
    """Folder of the image files, where it is not in its published place beside the questions."""
    allow_missing: bool = False
    """Leave out questions whose image file is not there, instead of refusing them."""

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def file(self, what: str, *names: str) -> Path:
        """The file of questions: `path` itself, or the first of `names` below it. Raises UserError when there is none."""
        if self.path.is_file():
            return self.path
        return _first(self.path, [self.path / name for name in names], what)

    def image_folder(self, *names: str) -> Path:
        """The folder of images: as the user says, or the first of `names` beside the questions. Raises UserError."""
        if self.images is not None:
            return _first(self.images, [self.images], "a folder of images")
        return _first(self.folder, [self.folder / name for name in names], "the folder of images", "Or name it with --images.")


def _first(folder: Path, candidates: list[Path], what: str, advice: str = "docs/lmm_tasks.md lists the layouts.") -> Path:
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if not folder.exists():
        raise UserError(f"{folder}: expected {what}, but there is nothing of that name. Check the path.")
    names = " or ".join(candidate.relative_to(folder).as_posix() for candidate in candidates)
    found = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "an empty folder"
    raise UserError(f"{folder}: expected {what} as {names}, found {found}. {advice}")


def objects(value: Any, path: Path, what: str) -> list[dict[str, Any]]:
    """`value` as a list of JSON objects, at least one. Raises UserError."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(
            f"{path}: expected {what}, a list of JSON objects, found another form. docs/lmm_tasks.md lists the layouts."
        )
    if not value:
        raise UserError(f"{path}: expected {what}, found none.")
    return value


def text(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text (or whole number, as text) under `key`. Raises UserError when it is missing, empty, NaN or of another kind."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise UserError(f"{where}: expected a text under '{key}', found {value!r}.")
    return str(value)


def texts(row: Mapping[str, Any], key: str, where: str, least: int) -> list[str]:
    """The list of texts under `key`, at least `least`. Raises UserError when it is anything else."""
    value = row.get(key)
    if not isinstance(value, list) or len(value) < least:
        raise UserError(f"{where}: expected at least {least} texts under '{key}', found {value!r}.")
    return [text({key: each}, key, where) for each in value]


def lines(path: Path, what: str) -> list[str]:
    """The lines that are not blank. Raises UserError when the file is not there or not in UTF-8."""
    try:
        content = require_file(path, what).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected {what} in UTF-8: {error}") from error
    return [line for line in content.splitlines() if line.strip()]


def option_number(row: Mapping[str, Any], key: str, options: Sequence[str], where: str) -> int:
    """The number of the right option, from 0. Raises UserError when there is no such option."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(options):
        raise UserError(f"{where}: answer {value!r} names no option; there are {len(options)}, counted from 0.")
    return value


def refuse_duplicates(rows: Sequence[Mapping[str, Any]], key: str, path: Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if str(row[key]) in seen:
            raise UserError(f"{path}: question {row[key]} occurs twice. Give every question its own id.")
        seen.add(str(row[key]))


def image_path(folder: Path, name: str, where: str) -> Path:
    """`folder / name`. Raises UserError when that would leave the folder."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{where}: expected the image's name inside its folder, found '{name}'.")
    return folder / parts


def with_images(
    rows: list[dict[str, Any]], key: str, source: Source, image: str = "image"
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows whose image file is there (or that have none), and what is to be said of the others.

    Raises:
        UserError: images are missing and that is not allowed, or all are.
    """
    missing = [row for row in rows if row[image] is not None and not row[image].is_file()]
    if not missing:
        return rows, []
    told = f"{len(missing)} of {len(rows)} questions have no image file, the first {missing[0][key]}: {missing[0][image]}"
    if len(missing) == len(rows):
        raise UserError(f"{source.path}: {told}. Check --images.")
    if not source.allow_missing:
        raise UserError(f"{source.path}: {told}. Check --images, or leave such questions out with --allow_missing.")
    gone = set(map(id, missing))
    return [row for row in rows if id(row) not in gone], [f"Left out: {told}."]
