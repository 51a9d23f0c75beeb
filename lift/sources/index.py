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

from lift.common.files import atomic_file, read_json, sha256_text, write_json
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.store import text_hash

FORMAT = 1
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


def index_path(source: SourceSettings, origin: Origin) -> Path:
    """In `source.index`, else in the folder of the environment variable LIFT_CACHE, else in the user's cache."""
    cache = Path(os.environ.get("LIFT_CACHE") or Path.home() / ".cache" / "lift") / "index"
    folder = source.index or cache / sha256_text(os.path.abspath(origin.path) + str(_options(source)))[:16]  # noqa: PTH100
    return folder / f"{source.name}-{origin.stem}.arrow"


class Kind(Protocol):
    """How one kind of source is read."""

    def origins(self, source: SourceSettings) -> list[Origin]:
        """In order. Raises UserError when there is nothing."""
        ...

    def fingerprint(self, source: SourceSettings, origin: Origin) -> str:
        """Changes when what `scan` reads does."""
        ...

    def scan(self, source: SourceSettings, origin: Origin, index: IndexWriter) -> None:
        """Adds the samples of `origin` in their order. Raises UserError when it is damaged or of another kind."""
        ...


def build_index(kind: Kind, source: SourceSettings, origin: Origin) -> None:
    """Builds the index of `origin`, unless the one that is there still fits.

    Raises:
        UserError: the file is damaged, or not of the kind the source says.
    """
    path = index_path(source, origin)
    wanted = sha256_text(f"{FORMAT} {_options(source)} {origin.path} {kind.fingerprint(source, origin)}")
    found = read_summary(path)
    # an image that was missing may have come since
    if found and found["fingerprint"] == wanted and all(cause != MISSING_IMAGE for _, cause, _ in found["dropped"]):
        return
    summary_path(path).unlink(missing_ok=True)
    with atomic_file(path) as temporary, pa.ipc.new_file(temporary.as_posix(), SCHEMA) as file:
        writer = IndexWriter(file)
        kind.scan(source, origin, writer)
        writer.flush()
    summary = {"fingerprint": wanted, "rows": writer.rows, "content": writer.content, "dropped": writer.ledger.rows()}
    write_json(summary_path(path), summary)


def summary_path(index: Path) -> Path:
    return index.with_suffix(".json")


def read_summary(index: Path) -> dict[str, Any] | None:
    """`fingerprint`, `rows`, `content` (hash of keys and captions), `dropped`; None when there is no whole index."""
    if not (summary_path(index).is_file() and index.is_file()):
        return None
    return read_json(summary_path(index), "the summary of an index")


def _options(source: SourceSettings) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(source).items() if name not in ("path", "index")}
