"""Answers of an evaluation on disk, written while it runs: one line a row, so that a killed run continues where it stopped.

The adapter, inside lmms-eval's process, appends `answers.jsonl` and thumbnails; `lift-eval lmm` reads them when the process has
ended. A line holds all that a `Record` needs, so the same path serves data folders and the hub.
"""

from __future__ import annotations

import fcntl
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from PIL import Image

from lift.common.errors import UserError
from lift.common.files import WORK_SUFFIX, atomic_file

ANSWERS_FILE = "answers.jsonl"
ROWS_FILE = "rows.json"
"""How many rows lmms-eval's task has."""
THUMBNAILS = "thumbnails"
THUMBNAIL_SIDE = 256
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class Answer:
    doc_id: int
    """Position of the row in lmms-eval's task."""
    doc: dict[str, Any]
    """The row as lmms-eval's task holds it, without images."""
    images: list[str]
    """`image_hash` of each image that the model saw."""
    prompt_sha256: str
    response: str
    log_probabilities: dict[str, float] | None
    """Option letter -> natural logarithm of its probability as the next token (see `eval.lmm.likelihood`)."""
    seconds: float
    """The row's share of the time that its batch took."""


class AnswerFile:
    """Appends answers; made by `open_answers`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, answers: Iterable[Answer]) -> None:
        lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
        self._file.write("".join(lines).encode("utf-8", errors="backslashreplace"))
        self._file.flush()


@contextmanager
def open_answers(folder: Path) -> Iterator[AnswerFile]:
    """For this process alone. A last line that a kill has cut is removed first.

    Raises:
        UserError: another process, left over from an earlier run, still writes there.
    """
    with (folder / ANSWERS_FILE).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another evaluation is writing there. Wait for its end.") from error
        file.truncate(_whole_bytes((folder / ANSWERS_FILE).read_bytes()))
        yield AnswerFile(file)


def read_answers(folder: Path) -> dict[int, Answer]:
    """doc_id -> answer; empty where nothing was answered yet. What follows a cut line does not count."""
    path = folder / ANSWERS_FILE
    content = path.read_bytes() if path.is_file() else b""
    answers = [_parse(line) for line in content[: _whole_bytes(content)].split(b"\n")[:-1]]
    return {answer.doc_id: answer for answer in answers if answer is not None}


def _whole_bytes(content: bytes) -> int:
    """Length of the lines that are whole. A power cut, unlike a kill, may leave zeros before the end, hence the parsing."""
    end = 0
    while (stop := content.find(b"\n", end) + 1) and _parse(content[end : stop - 1]) is not None:
        end = stop
    return end


def _parse(line: bytes) -> Answer | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(Answer)}:
        return None
    return Answer(**values)


_IS_IMAGE = object()


def without_images(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `doc` that JSON holds. Whatever has an image in it is left out; other objects become their text."""
    plain = {name: _plain(value) for name, value in doc.items()}
    return {name: value for name, value in plain.items() if value is not _IS_IMAGE}


def _plain(value: Any) -> Any:
    if isinstance(value, (Image.Image, bytes)):
        return _IS_IMAGE
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        items = {str(name): _plain(each) for name, each in value.items()}
        return _IS_IMAGE if any(each is _IS_IMAGE for each in items.values()) else items
    if isinstance(value, (list, tuple)):
        elements = [_plain(each) for each in value]
        return _IS_IMAGE if any(each is _IS_IMAGE for each in elements) else elements
    return str(value)


def write_thumbnail(image: Image.Image, sha256: str, folder: Path) -> None:
    """`folder/thumbnails/SHA-256.jpg`, unless it is there."""
    path = folder / THUMBNAILS / f"{sha256}.jpg"
    if path.is_file():
        return
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    unfinished = path.with_name(f"{path.name}{WORK_SUFFIX}")
    unfinished.parent.mkdir(exist_ok=True)
    small.save(unfinished, "JPEG", quality=_JPEG_QUALITY)
    unfinished.replace(path)


def zip_thumbnails(folder: Path, sha256s: Iterable[str], path: Path) -> None:
    """One entry a distinct image, in the order of its name, at a fixed date: equal thumbnails give equal bytes."""
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for sha256 in sorted(set(sha256s)):
            archive.writestr(zipfile.ZipInfo(f"{sha256}.jpg"), (folder / THUMBNAILS / f"{sha256}.jpg").read_bytes())
