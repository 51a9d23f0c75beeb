"""Images with their captions, as data sets publish them: one reader for each format, the same pairs out of all."""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.images import ImageFolder, ImageItem, image_from
from eval.settings import RetrievalData
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import read_json, require_file
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.sources import read_sources


@dataclass(frozen=True)
class CaptionedImage:
    id: str
    image: ImageItem
    captions: tuple[str, ...]
    """In the order of the annotations; the first one is what the official LIFT scripts use."""


def read_captioned_images(
    settings: RetrievalData, name: str, allow_missing: bool
) -> tuple[list[CaptionedImage], list[str], dict[str, Any]]:
    """The captioned images, the ids of those left out because their file is not there, and notes on the data.

    Args:
        name: of the task, for messages.
    Raises:
        UserError: a file of another form, an id that occurs twice, an image without captions or file, nothing left.
    """
    path = given(settings.path, f"{name}.path")
    form = _form(path, name) if settings.format == "auto" else settings.format
    if form == "webdataset":
        return _tars(path), [], {"format": form}
    readers = {"karpathy": _karpathy, "coco_captions": _coco_captions, "flickr_csv": _flickr_csv}
    images = ImageFolder(given(settings.images, f"{name}.images"), allow_missing, f"{name}.images")
    found: dict[str, CaptionedImage] = {}
    seen: set[str] = set()
    for identifier, file_name, captions in readers[form](path, settings.split):
        where = f"{path}: image {identifier}"
        if identifier in seen:
            raise UserError(f"{where}: occurs twice; expected one entry an image. Mend the file.")
        seen.add(identifier)
        kept = tuple(caption.strip() for caption in captions if isinstance(caption, str) and caption.strip())
        if not kept or len(kept) < len(captions):
            raise UserError(f"{where} ({file_name}): expected captions that are not empty, found {captions!r:.80}.")
        if image := images.find(file_name, identifier):
            found[identifier] = CaptionedImage(identifier, image, kept)
    if not found:
        raise UserError(f"{images.folder}: expected the images of {path}, found none of {len(seen)}. Check --{name}.images.")
    return list(found.values()), images.missing, {"format": form, "split": settings.split if form != "coco_captions" else None}


def _form(path: Path, name: str) -> str:
    """What a file or folder is, by its content."""
    if path.is_dir() or path.suffix == ".tar":
        return "webdataset"
    require_file(path, f"the captions of {name}")
    if path.suffix == ".csv":
        return "flickr_csv"
    values = read_json(path, f"the captions of {name}")
    if isinstance(values, dict) and "annotations" in values:
        return "coco_captions"
    if isinstance(values, dict) and "images" in values:
        return "karpathy"
    raise UserError(
        f"{path}: expected COCO captions (images, annotations) or Karpathy's splits (images with sentences), found neither. "
        f"Give --{name}.format."
    )


def _karpathy(path: Path, split: str) -> Iterator[tuple[str, str, list[Any]]]:
    values, splits = read_json(path, "Karpathy's splits"), set()
    for row in _rows(values, "images", path):
        try:
            splits.add(row["split"])
            if row["split"] != split:
                continue
            file_name = "/".join(filter(None, (row.get("filepath"), row["filename"])))
            identifier = str(row.get("cocoid", row.get("imgid", row["filename"])))
            captions = [sentence["raw"] for sentence in row["sentences"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: expected images with filename, split and sentences (raw), found {row!r:.80}.") from error
        yield identifier, file_name, captions
    _check_split(path, split, splits)


def _coco_captions(path: Path, split: str) -> Iterator[tuple[str, str, list[Any]]]:
    values = read_json(path, "COCO captions")
    try:
        captions: dict[Any, list[Any]] = {}
        numbers = set()
        for row in _rows(values, "annotations", path):
            if row["id"] in numbers:
                raise UserError(f"{path}: annotation {row['id']} occurs twice; expected one entry a caption. Mend the file.")
            numbers.add(row["id"])
            captions.setdefault(row["image_id"], []).append(row["caption"])
        # by id, as pycocotools and so the official script go through them
        for row in sorted(_rows(values, "images", path), key=lambda row: row["id"]):
            # files of several splits together say which one's folder an image lies in
            yield str(row["id"]), "/".join(filter(None, (row.get("split"), row["file_name"]))), captions.pop(row["id"], [])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected images (id, file_name) and annotations (id, image_id, caption): {error}.") from error
    if captions:
        raise UserError(f"{path}: expected the image {next(iter(captions))!r} of a caption under 'images', found none.")


def _flickr_csv(path: Path, split: str) -> Iterator[tuple[str, str, list[Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a CSV in UTF-8: {error}.") from error
    rows, splits = csv.DictReader(io.StringIO(text, newline="")), set()
    for row in rows:
        try:
            splits.add(row["split"])
            if row["split"] == split:
                if not row["filename"] or not row["raw"]:
                    raise ValueError("a row without filename or raw")
                yield row.get("img_id") or row["filename"], row["filename"], _literal_list(row["raw"])
        except (KeyError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}: expected columns raw (a list of captions), split, filename: {error!r}.") from error
    _check_split(path, split, splits)


def _literal_list(text: str) -> list[Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = ast.literal_eval(text)
    if not isinstance(values, list):
        raise ValueError(f"{text[:40]} is not a list")
    return values


def _rows(values: Any, key: str, path: Path) -> list[dict[str, Any]]:
    rows = values.get(key) if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects under '{key}', found {str(rows)[:40]}.")
    return rows


def _check_split(path: Path, split: str, splits: set[str]) -> None:
    if split not in splits:
        raise UserError(f"{path}: expected the split '{split}', found {', '.join(sorted(map(str, splits))) or 'nothing'}.")


def _tars(path: Path) -> list[CaptionedImage]:
    """All samples of the tars. Raises UserError at the first fault: encoders are comparable only on the same pairs."""
    ledger = DropLedger()
    shards = read_sources([SourceSettings(kind="webdataset", path=str(path), name=path.stem)], ledger)
    if len(ledger):
        key, cause, _ = ledger.rows()[0]
        raise UserError(f"{path}: key {key}: {cause}. Two encoders are comparable only on the same pairs; mend or remove it.")
    samples = [sample for shard in shards for sample in shard.samples]
    return [
        CaptionedImage(sample.key, image_from(sample.key, sample.image.read), tuple(sample.captions.values()))
        for sample in samples
    ]
