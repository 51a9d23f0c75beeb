"""The index of a source: one memory-mapped Arrow file for each tar, JSON file or table, built once and reused.

A reader of one kind of source goes through a file and adds rows; the index keeps key, captions, caption hashes and the
place of the image, and beside it, as JSON, what was dropped and a hash of the content. An index is reused while the file and
the settings it came from are the same. It takes about 60 bytes a sample and the length of its captions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.ipc

from lift.common.files import read_json, sha256_file, sha256_text, working_file, write_json
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.store import text_hash

FORMAT = 2
ROWS_PER_WRITE = 10_000
MISSING_IMAGE = "missing image"
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "key_hash": pa.uint64(),
        "captions": pa.large_list(pa.large_string()),
        "caption_hashes": pa.large_list(pa.uint64()),
        "path": pa.large_string(),
        "offset": pa.int64(),
        "size": pa.int64(),
    }
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What one index is built of: a tar, a JSON or parquet file, or a table. `stem` names its shards."""

    stem: str
    path: str


class IndexWriter:
    """Rows of one index as its reader finds them; `ledger` holds what cannot be used."""

    def __init__(self, writer: Any) -> None:
        self.ledger = DropLedger()
        self._writer = writer
        self._rows: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self.rows = 0

    def add(self, key: str, captions: list[Any], path: str | None, offset: int = 0, size: int = -1) -> None:
        """One sample. `path` is None when its image is missing; what of `captions` is no text, or empty, is left out."""
        key = _encodable(key)
        if path is None:
            self.ledger.drop(key, MISSING_IMAGE)
            return
        texts = [_encodable(text).strip() if isinstance(text, str) else "" for text in captions]
        usable = [text or None for text in texts]
        if not any(usable):
            self.ledger.drop(key, "empty caption")
            return
        hashes = [text_hash(text) if text else None for text in usable]
        self._digest.update(f"{key}\0{usable}\n".encode())
        row = {"key": key, "key_hash": text_hash(key), "captions": usable, "caption_hashes": hashes}
        self._rows.append(row | {"path": path, "offset": offset, "size": size})
        self.rows += 1
        if len(self._rows) == ROWS_PER_WRITE:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, SCHEMA))
            self._rows = []

    @property
    def content(self) -> str:
        """Hash of all keys and captions in their order."""
        return self._digest.hexdigest()


def _encodable(text: str) -> str:
    """Half a surrogate pair, which JSON can hold, is no character: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def summary_path(source: SourceSettings, origin: Origin) -> Path:
    """In `source.index`, else in the folder of the environment variable LIFT_CACHE, else in the user's cache."""
    cache = Path(os.environ.get("LIFT_CACHE") or Path.home() / ".cache" / "lift") / "index"
    of_source = sha256_text(os.path.abspath(origin.path) + str(_options(source)))[:16]  # noqa: PTH100
    return (source.index or cache) / of_source / f"{source.name}-{origin.stem}.json"


class Kind(Protocol):
    """How one kind of source is read."""

    images_apart: bool
    """Whether images are files of their own, which may come after the captions."""

    def origins(self, source: SourceSettings) -> list[Origin]:
        """In order. Raises UserError when there is nothing."""
        ...

    def fingerprint(self, source: SourceSettings, origin: Origin) -> str:
        """Changes when what `scan` reads does."""
        ...

    def scan(self, source: SourceSettings, origin: Origin, index: IndexWriter) -> None:
        """Adds the samples of `origin` in their order. Raises UserError when it is damaged or of another kind."""
        ...


def build_index(kind: Kind, source: SourceSettings, origin: Origin, look_again: bool) -> None:
    """Builds the index of `origin`, unless the one that is there still fits.

    The index is named by its content, and its summary written after it, so that whoever reads the one has the other, whoever
    else builds at the same time.

    Args:
        look_again: also when images are missing that may have come since.
    Raises:
        UserError: the file is damaged, or not of the kind the source says.
    """
    summary = summary_path(source, origin)
    wanted = sha256_text(f"{FORMAT} {_options(source)} {origin.path} {kind.fingerprint(source, origin)}")
    found = read_summary(summary)
    if found and found["fingerprint"] == wanted and Path(found["index"]).is_file():
        misses = kind.images_apart and any(cause == MISSING_IMAGE for _, cause, _ in found["dropped"])
        if not (misses and look_again):
            return
    with working_file(summary) as temporary:
        with pa.ipc.new_file(temporary.as_posix(), SCHEMA) as file:
            writer = IndexWriter(file)
            kind.scan(source, origin, writer)
            writer.flush()
        index = summary.with_suffix(f".{sha256_file(temporary)[:16]}.arrow")
        temporary.replace(index)
    row = {"fingerprint": wanted, "index": str(index), "rows": writer.rows, "content": writer.content}
    write_json(summary, row | {"dropped": writer.ledger.rows()})


def read_summary(summary: Path) -> dict[str, Any] | None:
    """`fingerprint`, `index` (file), `rows`, `content` (hash of keys and captions), `dropped`; None when there is none."""
    return read_json(summary, "the summary of an index") if summary.is_file() else None


def _options(source: SourceSettings) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(source).items() if name not in ("path", "index")}
