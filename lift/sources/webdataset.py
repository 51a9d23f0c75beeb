"""Webdataset tars as img2dataset writes them, local or behind a URL: KEY.jpg with KEY.json and/or KEY.txt.

Only headers and captions are read; the image is read later, by its offset. Nothing is extracted: member names never become
paths.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.common.tars import tar_files
from lift.settings import SourceSettings
from lift.sources import storage
from lift.sources.index import IndexWriter, Origin

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
TEXT_SUFFIXES = frozenset({"json", "txt"})
images_apart = False


def origins(source: SourceSettings) -> list[Origin]:
    return [Origin(PurePosixPath(path).stem, path) for path in storage.list_files(source.path, ".tar", "a webdataset tar")]


def fingerprint(source: SourceSettings, origin: Origin) -> str:
    return storage.fingerprint(origin.path)


def scan(source: SourceSettings, origin: Origin, index: IndexWriter) -> None:
    for stem, parts in read_members(origin.path, index.ledger).items():
        key = f"{source.name}/{stem}"
        captions = _captions(source, key, parts, index)
        if captions is not None:
            image = next((parts[suffix] for suffix in parts if suffix in IMAGE_SUFFIXES), None)
            index.add(key, captions, origin.path if image else None, *(image or ()))


def read_members(tar: str, ledger: DropLedger, texts: frozenset[str] = TEXT_SUFFIXES) -> dict[str, dict[str, Any]]:
    """stem -> suffix -> content (bytes) of a member whose suffix is in `texts`, else (offset, size); in the tar's order.

    Members whose name leads out of the tar go to `ledger`. Raises UserError for what is not a whole, uncompressed tar.
    """
    members: dict[str, dict[str, Any]] = {}
    with storage.open_file(tar) as file:
        for member in tar_files(file, tar):
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                ledger.drop(f"{PurePosixPath(tar).name}:{member.name}", "unsafe member name")
                continue
            stem, _, suffix = name.name.partition(".")
            parts = members.setdefault(str(name.parent / stem), {})
            if suffix.lower() in parts:
                raise UserError(f"{tar}: member {member.name} occurs twice. Fetch the file again or remove it.")
            parts[suffix.lower()] = (member.offset_data, member.size)
            if suffix.lower() in texts:
                file.seek(member.offset_data)
                parts[suffix.lower()] = file.read(member.size)
    return members


def _captions(source: SourceSettings, key: str, parts: dict[str, Any], index: IndexWriter) -> list[Any] | None:
    """The fields `caption_fields` of KEY.json; without them its `captions` or `caption`, else KEY.txt. None: dropped."""
    record: Any = {}
    if "json" in parts:
        try:
            record = json.loads(parts["json"])
        except ValueError as error:
            index.ledger.drop(key, "unreadable metadata", str(error))
            return None
        record = record if isinstance(record, dict) else {}
    text = parts["txt"].decode("utf-8", errors="replace") if "txt" in parts else None
    if source.caption_fields:
        return [text if field == "txt" else record.get(field) for field in source.caption_fields]
    found = record.get("captions") or record.get("caption")
    captions = found if isinstance(found, list) else [] if found is None else [found]
    return captions or ([] if text is None else [text])
