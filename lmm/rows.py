"""Rows of conversation files, read where they lie: only offsets are in memory, however large the file.

In: the sources of a stage. Out: a sequence of rows that can be had in any order and by any process, and the identity of the
data. Loader workers share the pages of the mapped files; nothing is copied to each of them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lift.common.errors import UserError
from lift.common.files import require_file, sha256_file, sha256_text
from lmm.faults import SampleFault
from lmm.images import ImageStore, image_size_in_bytes, open_images
from lmm.settings import ConversationSource
from lmm.tables import TableRows, table_identity

WHAT = "conversations in LLaVA's format"


@dataclass(frozen=True)
class Row:
    key: str
    """Unique name for the ledger: file, position and `id` of the row."""
    value: Any
    image_store: ImageStore | None
    """Where the images that the row names are; None when the source has no such place."""
    length: int = 0
    """Tokens, image tokens included; known once the row was checked, as is `images`."""
    images: int = 0


class RowFile(Protocol):
    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...


class JsonRows:
    """A LLaVA JSON file (a list) or JSON lines, of which each row is parsed when it is asked for.

    Raises:
        UserError: the file is missing, not UTF-8, not JSON, not a list, or empty.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        require_file(path, WHAT)
        self.stamp = _stamp(path)
        content = path.read_bytes()
        _require_utf8(content, path)
        find = _line_spans if path.suffix == ".jsonl" else _element_spans
        self.spans = np.array(list(find(content, path)), dtype=np.int64).reshape(-1, 2)
        if not len(self.spans):
            raise UserError(f"{path}: expected a non-empty list of conversations, found something else: it has no rows.")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Any:
        start, stop = self.spans[number]
        return json.loads(_mapped(self.path, self.stamp, os.getpid())[start:stop])


def _require_utf8(content: bytes, path: Path) -> None:
    step = 1 << 24
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), step):
            decoder.decode(content[start : start + step], start + step >= len(content))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected {WHAT} in JSON, but it cannot be read: {error}") from error


def _line_spans(content: bytes, path: Path) -> Iterator[tuple[int, int]]:
    start = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: expected one JSON object a line ({WHAT}): {error}") from error
            yield start, start + len(line)
        start += len(line) + 1


def _element_spans(content: bytes, path: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the elements of a JSON list.

    Read as Latin-1, every byte is one character, so that the parser's positions are byte offsets; the structure of JSON is
    ASCII, and what is inside strings does not matter here.
    """
    text, decoder = content.decode("latin-1"), json.JSONDecoder()

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    def fault(message: str, position: int) -> UserError:
        line = text.count("\n", 0, position) + 1
        return UserError(f"{path}: expected {WHAT} in JSON, but it cannot be read: {message} (line {line}, byte {position})")

    position = skip(3 if text.startswith("\xef\xbb\xbf") else 0)
    if text[position : position + 1] != "[":
        try:
            value = json.loads(content)
        except ValueError as error:
            raise fault(str(error), position) from error
        raise UserError(
            f"{path}: expected a non-empty list of conversations, found {_kind(value)}. Write a JSON list, or "
            "one object a line in a file that ends with .jsonl."
        )
    position = skip(position + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            _, stop = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fault(error.msg, error.pos) from error
        except RecursionError as error:
            raise fault("nested too deeply", position) from error
        yield position, stop
        position = skip(stop)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            raise fault("expected ',' or ']'", position)
        position = skip(position + 1)
    if skip(position + 1) != len(text):
        raise fault("more text after the end of the list", position + 1)


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


@lru_cache(maxsize=64)
def _mapped(path: Path, stamp: tuple[int, int], process: int) -> mmap.mmap:
    """Raises UserError when the file is no longer the one whose rows were found."""
    if not path.is_file() or _stamp(path) != stamp:
        raise UserError(f"{path}: the file has changed since this command began. Start it again.")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, which tell a new file from the old."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Rows(Sequence[Row]):
    """The rows of several sources one after the other, or a selection of them.

    Attributes:
        lengths, images, cut: int64 [rows], tokens, images, and tokens cut off each row; zeros until the rows were checked. As
            arrays they cost loader workers nothing, and sorting by length needs no row to be parsed.
    """

    def __init__(self, parts: list[tuple[RowFile, ImageStore | None]], selected: np.ndarray | None = None) -> None:
        self.parts = parts
        self.starts = np.cumsum([0] + [len(file) for file, _ in parts])
        self.selected = np.arange(self.starts[-1]) if selected is None else selected
        self.lengths = np.zeros(len(self.selected), dtype=np.int64)
        self.images = np.zeros(len(self.selected), dtype=np.int64)
        self.cut = np.zeros(len(self.selected), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.selected)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return self.select(np.arange(len(self))[number])
        whole = int(self.selected[number])
        part = int(np.searchsorted(self.starts, whole, side="right")) - 1
        file, image_store = self.parts[part]
        place = whole - int(self.starts[part])
        value = file[place]
        name = value.get("id", "") if isinstance(value, dict) else ""
        return Row(f"{file.name}#{place}:{name}", value, image_store, int(self.lengths[number]), int(self.images[number]))

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def select(self, numbers: Any) -> Rows:
        """The rows at these positions, in this order."""
        numbers = np.asarray(numbers, dtype=np.int64)
        chosen = Rows(self.parts, self.selected[numbers])
        chosen.lengths, chosen.images, chosen.cut = self.lengths[numbers], self.images[numbers], self.cut[numbers]
        return chosen

    @property
    def cut_samples(self) -> int:
        return int((self.cut > 0).sum())


def read_sources(sources: list[ConversationSource]) -> Rows:
    """All rows of all sources, in order. Raises UserError for a source that is missing, unreadable, not a list, or empty."""
    parts: list[tuple[RowFile, ImageStore | None]] = []
    for source in sources:
        images = None if source.images is None else open_images(source.images, f"the images of {source.annotations.name}")
        parts.append((_open_rows(source), images))
    return Rows(parts)


def _open_rows(source: ConversationSource) -> RowFile:
    if source.annotations.is_dir():
        return TableRows(source.annotations, source.split)
    require_file(source.annotations, WHAT)
    return _open_json(source.annotations, _stamp(source.annotations))


@lru_cache(maxsize=32)
def _open_json(path: Path, stamp: tuple[int, int]) -> JsonRows:
    """Kept, because a command looks at its sources several times."""
    return JsonRows(path)


def describe_sources(sources: list[ConversationSource]) -> list[dict[str, Any]]:
    """Identity of the data: a hash of each annotation file, and one of the names and sizes of the images it names."""
    return [_describe(source) for source in sources]


def _describe(source: ConversationSource) -> dict[str, Any]:
    rows = read_sources([source])
    file, images = rows.parts[0]
    if isinstance(file, TableRows):
        return {"annotations": str(source.annotations), **table_identity(file)}
    names: set[str] = set()
    for row in rows:
        names.update(image_names(row.value))
    lines = [f"{name} {_size(images, name)}" for name in sorted(names)]
    return {
        "annotations": str(source.annotations),
        "annotations_sha256": sha256_file(source.annotations),
        "images": len(names),
        "images_sha256": sha256_text("\n".join(lines)),
    }


def image_names(value: Any) -> list[str]:
    """The names of the images of a row, however malformed the row is."""
    if not isinstance(value, dict):
        return []
    found = value.get("images") if value.get("image") is None else value["image"]
    return [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str) and name]


def _size(images: ImageStore | None, name: str) -> int:
    if images is None:
        return -1
    try:
        return image_size_in_bytes(images.find(name))
    except SampleFault:
        return -1


def content_digest(value: Any) -> bytes:
    """16 bytes that are the same for rows with the same content."""
    text = json.dumps(value, sort_keys=True, default=lambda other: hashlib.sha256(other).hexdigest())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
