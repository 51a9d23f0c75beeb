"""Image-caption sources: from settings to shards of samples, each with a key, its captions and where its image lies.

Only headers and captions are read here; image bytes are read later, by offset, so that any sample can be had in any order.
Nothing is extracted from a tar: member names never become paths.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
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

    def keyed_captions(self) -> list[tuple[str, str]]:
        """(caption key, caption) of all samples, in order."""
        return [pair for sample in self.samples for pair in sample.captions.items()]


def read_sources(sources: list[SourceSettings], ledger: DropLedger) -> list[Shard]:
    """Reads all sources in order.

    Raises:
        UserError: a source is missing, unreadable or empty, or two samples have the same key.
    """
    readers = {"webdataset": _read_webdataset, "coco_captions": _read_coco, "llava_json": _read_llava}
    shards = [shard for source in sources for shard in readers[source.kind](source, ledger)]
    seen: set[str] = set()
    name, times = Counter(shard.name for shard in shards).most_common(1)[0] if shards else ("", 0)
    if times > 1:
        raise UserError(f"two sources have a shard '{name}'. Give the sources different names (data.name).")
    for shard in shards:
        for sample in shard.samples:
            if sample.key in seen:
                raise UserError(
                    f"key '{sample.key}' of {shard.name} occurs twice. Mend the file, or give the sources different names "
                    "(data.name)."
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
                    folder, slash, name = member.name.removeprefix("./").rpartition("/")
                    stem, _, suffix = name.partition(".")
                    parts = members.setdefault(f"{folder}{slash}{stem}", {})
                    if suffix.lower() in parts:
                        raise tarfile.ReadError(f"member {member.name} occurs twice")
                    parts[suffix.lower()] = (member.offset_data, member.size)
        # tarfile takes a file that was cut off for one that ends there; only the mark of the end tells them apart
        if ImageLocation(tar, end, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"the mark of its end is missing at byte {end} of {tar.stat().st_size}")
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a whole, uncompressed tar: {error}. Fetch the file again or remove it.") from error
    return members


def _webdataset_sample(key: str, parts: dict[str, tuple[int, int]], tar: Path, ledger: DropLedger) -> Sample | None:
    """Captions: `captions` or `caption` of KEY.json, else KEY.txt."""
    captions: list[Any] = []
    if "json" in parts:
        try:
            record = json.loads(ImageLocation(tar, *parts["json"]).read())
        except ValueError as error:
            ledger.drop(key, "unreadable metadata", f"{tar.name}: {error}")
            return None
        if isinstance(record, dict):
            found = record.get("captions") or record.get("caption")
            captions = found if isinstance(found, list) else [] if found is None else [found]
    if not captions and "txt" in parts:
        captions = [ImageLocation(tar, *parts["txt"]).read().decode("utf-8", errors="replace")]
    suffix = next((s for s in parts if s in IMAGE_SUFFIXES), None)
    return _sample(key, captions, ImageLocation(tar, *parts[suffix]) if suffix else None, ledger)


def _read_coco(source: SourceSettings, ledger: DropLedger) -> Iterator[Shard]:
    content = read_json(source.path, "COCO captions")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in ("images", "annotations")):
        raise UserError(f"{source.path}: expected COCO captions with the lists 'images' and 'annotations'. Check data.path.")
    captions: dict[Any, list[Any]] = {}
    for number, annotation in enumerate(content["annotations"]):
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str)):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        else:
            ledger.drop(f"{source.name}/annotations#{number}", "malformed record", "expected image_id and caption")

    def read(record: dict[str, Any]) -> tuple[str, list[Any]]:
        return f"{record.get('split', '')}/{record['file_name']}".lstrip("/"), captions.get(record["id"], [])

    yield _json_shard(source, content["images"], read, ledger)


def _read_llava(source: SourceSettings, ledger: DropLedger) -> Iterator[Shard]:
    content = read_json(source.path, "LLaVA conversations")
    if not isinstance(content, list):
        raise UserError(f"{source.path}: expected a list of conversations, found a {type(content).__name__}. Check data.path.")

    def read(record: dict[str, Any]) -> tuple[str, list[Any]]:
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        return record["image"], answers[:1]

    yield _json_shard(source, content, read, ledger)


def _json_shard(
    source: SourceSettings, records: list[Any], read: Callable[[Any], tuple[str, list[Any]]], ledger: DropLedger
) -> Shard:
    """The samples of one JSON file. `read` gives image name and captions of a record; what it chokes on goes to the ledger."""
    assert source.images is not None
    images = require_folder(source.images, f"the folder of the images of {source.path.name}")
    samples = []
    for number, record in enumerate(records):
        try:
            key = f"{source.name}/{record['id']}"
            name, captions = read(record)
            path = images / name
        except (KeyError, TypeError) as error:
            ledger.drop(f"{source.name}/#{number}", "malformed record", f"{type(error).__name__}: {error}")
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            ledger.drop(key, "image outside its folder", name)
            continue
        sample = _sample(key, captions, ImageLocation(path) if path.is_file() else None, ledger)
        samples += [sample] if sample is not None else []
    return Shard(f"{source.name}-{source.path.stem}", samples)
