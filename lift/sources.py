"""Image-caption sources: from settings to shards of samples, each with a key, its captions and where its image lies.

Only headers and captions are read here; image bytes are read later, by offset, so that any sample can be had in any order.
Nothing is extracted from a tar: member names never become paths.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lift.common.errors import UserError
from lift.common.files import read_json, require_file, require_folder
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


@dataclass(frozen=True)
class ImageLocation:
    """Bytes of an image: `size` bytes at `offset` of `path`; a size of -1 means the whole file."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        if self.size < 0:
            return self.path.read_bytes()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Sample:
    """`captions` maps a caption key (`KEY#POSITION`, the key of the embedding store) to its text."""

    key: str
    captions: dict[str, str]
    image: ImageLocation


@dataclass(frozen=True)
class Shard:
    """A unit of work for embedding: the samples of one tar or of one JSON file."""

    name: str
    samples: list[Sample]


def read_sources(sources: list[SourceSettings], ledger: DropLedger) -> list[Shard]:
    """Reads all sources in order.

    Raises:
        UserError: a source is missing, unreadable or empty, or two samples have the same key.
    """
    readers = {"webdataset": _read_webdataset, "coco_captions": _read_coco, "llava_json": _read_llava}
    shards = [shard for source in sources for shard in readers[source.kind](source, ledger)]
    seen: set[str] = set()
    for shard in shards:
        for sample in shard.samples:
            if sample.key in seen:
                raise UserError(
                    f"key '{sample.key}' of {shard.name} occurs twice. Give the sources different names (data.name)."
                )
            seen.add(sample.key)
    if not seen:
        raise UserError(
            f"{', '.join(str(s.path) for s in sources)}: no usable image-caption pair. {ledger.summary(len(ledger))}."
        )
    return shards


def _sample(key: str, captions: list[Any], image: ImageLocation | None, ledger: DropLedger) -> Sample | None:
    """Records in the ledger what cannot be used; None when nothing of the sample is left."""
    if image is None:
        ledger.drop(key, "missing image")
        return None
    usable = {f"{key}#{i}": text.strip() for i, text in enumerate(captions) if isinstance(text, str) and text.strip()}
    if not usable:
        ledger.drop(key, "empty caption")
        return None
    return Sample(key, usable, image)


def _read_webdataset(source: SourceSettings, ledger: DropLedger) -> Iterator[Shard]:
    tars = sorted(source.path.glob("*.tar")) if source.path.is_dir() else [require_file(source.path, "a webdataset tar")]
    if not tars:
        raise UserError(f"{source.path}: expected webdataset tars (*.tar), found none. Check data.path.")
    for tar in tars:
        samples = [_webdataset_sample(f"{source.name}/{stem}", parts, tar, ledger) for stem, parts in _tar_members(tar).items()]
        yield Shard(f"{source.name}-{tar.stem}", [sample for sample in samples if sample is not None])


def _tar_members(tar: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """stem -> suffix -> (offset, size) of the regular members of an uncompressed tar."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isfile():
                    stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                    members.setdefault(stem, {})[suffix.lower()] = (member.offset_data, member.size)
        # tarfile takes a file that was cut off for one that ends there; only the mark of the end tells them apart
        if ImageLocation(tar, end, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"the mark of its end is missing at byte {end} of {tar.stat().st_size}")
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a whole, uncompressed tar: {error}. Fetch the file again or remove it.") from error
    return members


def _webdataset_sample(key: str, parts: dict[str, tuple[int, int]], tar: Path, ledger: DropLedger) -> Sample | None:
    captions: list[Any] = []
    if "json" in parts:
        try:
            record = json.loads(ImageLocation(tar, *parts["json"]).read())
            captions = record.get("captions") or [record.get("caption")]
        except (ValueError, AttributeError) as error:
            ledger.drop(key, "unreadable metadata", f"{tar.name}: {error}")
            return None
    elif "txt" in parts:
        captions = [ImageLocation(tar, *parts["txt"]).read().decode("utf-8", errors="replace")]
    suffix = next((s for s in parts if s in IMAGE_SUFFIXES), None)
    return _sample(key, captions, ImageLocation(tar, *parts[suffix]) if suffix else None, ledger)


def _read_coco(source: SourceSettings, ledger: DropLedger) -> Iterator[Shard]:
    assert source.images is not None
    images = require_folder(source.images, "the folder of the COCO images")
    content = read_json(source.path, "COCO captions")
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise UserError(f"{source.path}: expected COCO captions with 'images' and 'annotations'. Check data.path.")
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    samples = []
    for record in content["images"]:
        path = images / record.get("split", "") / record["file_name"]
        location = ImageLocation(path) if path.is_file() else None
        samples.append(_sample(f"{source.name}/{record['id']}", captions.get(record["id"], []), location, ledger))
    yield Shard(f"{source.name}-{source.path.stem}", [sample for sample in samples if sample is not None])


def _read_llava(source: SourceSettings, ledger: DropLedger) -> Iterator[Shard]:
    assert source.images is not None
    images = require_folder(source.images, "the folder of the LLaVA images")
    content = read_json(source.path, "LLaVA conversations")
    if not isinstance(content, list):
        raise UserError(f"{source.path}: expected a list of conversations, found a {type(content).__name__}. Check data.path.")
    samples = []
    for record in content:
        path = images / str(record.get("image", ""))
        answers = [turn["value"] for turn in record.get("conversations", []) if turn.get("from") == "gpt"]
        samples.append(
            _sample(f"{source.name}/{record['id']}", answers[:1], ImageLocation(path) if path.is_file() else None, ledger)
        )
    yield Shard(f"{source.name}-{source.path.stem}", [sample for sample in samples if sample is not None])
