"""Plain caption lists for `lift embed`: a text file with one caption a line, or JSON lines with `key` and `caption`.

One pass over the file, which is never held whole, finds where every shard begins and records in the drop ledger each line that
cannot be embedded. Out come shards of a fixed number of lines, each of which reads its own captions by byte offset.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from lift.common.errors import UserError
from lift.common.files import require_file
from lift.common.ledger import DropLedger
from lift.store import text_hashes

Format = Literal["lines", "jsonl"]


class LineFault(ValueError):
    """A line that gives no caption: the cause for the ledger, and its detail."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.detail = detail


@dataclass(frozen=True)
class CaptionListShard:
    """`lines` lines of a caption list from byte `offset` on; `first` is the number of the first of them (from 1).

    The name holds a digest of what the shard yields, so that a store made of another list is never taken for its own.
    """

    name: str
    path: Path
    format: Format
    offset: int
    first: int
    lines: int
    repeated: frozenset[int]
    """Numbers of the lines whose key occurred before."""

    def keyed_captions(self) -> list[tuple[str, str]]:
        """(key, caption) of every usable line, in order.

        Raises:
            UserError: the file is no longer what it was when it was divided into shards.
        """
        digest = hashlib.sha256()
        keyed = []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for number, line in enumerate(islice(file, self.lines), start=self.first):
                digest.update(line)
                try:
                    pair = parse_line(line, number, self.format)
                except LineFault:
                    continue  # the ledger has it since the file was divided
                if number not in self.repeated:
                    keyed.append(pair)
        if _shard_name(self.format, self.first, self.repeated, digest) != self.name:
            raise UserError(f"{self.path}: was changed while its captions were being embedded. Start again.")
        return keyed

    def caption_hashes(self) -> np.ndarray:
        return text_hashes([caption for _, caption in self.keyed_captions()])

    def sample_of(self, caption_key: str) -> str:
        """Each line of a list is a sample of its own."""
        return caption_key


@dataclass
class _Block:
    """The lines of a shard while the file is read for the first time."""

    offset: int
    size: int = 0
    lines: int = 0
    usable: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


def read_captions(path: Path, format: Format, shard_size: int, ledger: DropLedger) -> list[CaptionListShard]:
    """Divides the file into shards of `shard_size` lines; those without a usable caption are left out.

    Lines that are empty, malformed, not UTF-8 or repeat a key go to the ledger as `captions/LINE_NUMBER`. While a jsonl file
    is read, its keys take eight bytes a line.

    Raises:
        UserError: no such file, or no usable caption in it.
    """
    blocks: list[_Block] = []
    key_hashes = array("q")  # 0 stands for a line without a key
    for number, line in _numbered_lines(require_file(path, "a list of captions")):
        if (number - 1) % shard_size == 0:
            blocks.append(_Block(blocks[-1].offset + blocks[-1].size if blocks else 0))
        block = blocks[-1]
        block.size += len(line)
        block.lines += 1
        block.digest.update(line)
        key_hash = 0
        try:
            key, _ = parse_line(line, number, format)
            key_hash = hash(key) or 1
            block.usable += 1
        except LineFault as fault:
            ledger.drop(f"captions/{number}", str(fault), fault.detail)
        if format == "jsonl":
            key_hashes.append(key_hash)
    repeated = _repeated_keys(path, format, key_hashes)
    for number, detail in repeated.items():
        ledger.drop(f"captions/{number}", "duplicate key", detail)
    shards = []
    for index, block in enumerate(blocks):
        first = index * shard_size + 1
        repeats = frozenset(number for number in range(first, first + block.lines) if number in repeated)
        if block.usable > len(repeats):
            name = _shard_name(format, first, repeats, block.digest)
            shards.append(CaptionListShard(name, path, format, block.offset, first, block.lines, repeats))
    if not shards:
        raise UserError(f"{path}: no usable caption; {ledger.summary(len(ledger))}.")
    return shards


def parse_line(line: bytes, number: int, format: Format) -> tuple[str, str]:
    """Key and caption, stripped of white space at its ends, of line `number` (from 1).

    Raises:
        LineFault: empty, not UTF-8, or (jsonl) not an object with the strings `key` (or an integer) and `caption`.
    """
    try:
        text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise LineFault("not UTF-8", str(error)) from error
    key = f"captions/{number}"
    if format == "jsonl" and text:
        key, text = _parse_object(text)
    if not text:
        raise LineFault("empty caption")
    return key, text


def _parse_object(text: str) -> tuple[str, str]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineFault("malformed record", f"not JSON: {error}") from error
    key, caption = (row.get("key"), row.get("caption")) if isinstance(row, dict) else (None, None)
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if not isinstance(key, str) or not key or not isinstance(caption, str):
        raise LineFault("malformed record", "expected an object with the strings key and caption")
    try:
        f"{key}{caption}".encode()
    except UnicodeEncodeError as error:
        raise LineFault("malformed record", f"half a surrogate pair: {error}") from error
    return key, caption.strip()


def _repeated_keys(path: Path, format: Format, key_hashes: array[int]) -> dict[int, str]:
    """Line number -> what it repeats. Only keys whose hashes meet are compared, so memory does not grow with the keys."""
    values, counts = np.unique(np.frombuffer(key_hashes, np.int64), return_counts=True)
    candidates = set(values[counts > 1].tolist()) - {0}
    first_line: dict[str, int] = {}
    repeated: dict[int, str] = {}
    for number, line in _numbered_lines(path) if candidates else ():
        if key_hashes[number - 1] in candidates:
            key, _ = parse_line(line, number, format)
            if first_line.setdefault(key, number) != number:
                repeated[number] = f"key '{key}' is that of line {first_line[key]}"
    return repeated


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1. They end at line feeds only: captions may hold other line separators."""
    with path.open("rb") as file:
        yield from enumerate(file, start=1)


def _shard_name(format: Format, first: int, repeated: frozenset[int], content: hashlib._Hash) -> str:
    digest = hashlib.sha256(f"{format} {sorted(repeated)} {content.hexdigest()}".encode())
    return f"captions-{first:010d}-{digest.hexdigest()[:12]}"
