"""Captions in one JSON file beside a folder of images: COCO captions, and LLaVA-Pretrain conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lift.common.errors import UserError
from lift.common.files import read_json, require_folder
from lift.settings import SourceSettings
from lift.sources import storage
from lift.sources.index import IndexWriter, Origin

Read = Callable[[dict[str, Any]], tuple[str, list[Any]]]
"""Image name and captions of a record; raises KeyError or TypeError for a malformed one."""


class JsonFile:
    """The kind of source whose records `records` takes out of the file."""

    images_apart = True

    def __init__(self, records: Callable[[SourceSettings, IndexWriter], tuple[list[Any], Read]]) -> None:
        self._records = records

    def origins(self, source: SourceSettings) -> list[Origin]:
        (path,) = storage.list_files(source.path, ".json", "a JSON file")[:1]
        return [Origin(Path(path).stem, path)]

    def fingerprint(self, source: SourceSettings, origin: Origin) -> str:
        return storage.fingerprint(origin.path)

    def scan(self, source: SourceSettings, origin: Origin, index: IndexWriter) -> None:
        assert source.images is not None
        images = require_folder(Path(source.images), f"the folder of the images of {Path(source.path).name}")
        records, read = self._records(source, index)
        for number, record in enumerate(records):
            try:
                key = f"{source.name}/{record['id']}"
                name, captions = read(record)
                path = images / name
            except (KeyError, TypeError) as error:
                index.ledger.drop(f"{source.name}/#{number}", "malformed record", f"{type(error).__name__}: {error}")
                continue
            if Path(name).is_absolute() or ".." in Path(name).parts:
                index.ledger.drop(key, "image outside its folder", name)
                continue
            index.add(key, captions, str(path) if path.is_file() else None)


def coco_records(source: SourceSettings, index: IndexWriter) -> tuple[list[Any], Read]:
    """`images` with `file_name`, and `split` where the images lie by split; captions from `annotations`."""
    content = read_json(Path(source.path), "COCO captions")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in ("images", "annotations")):
        raise UserError(f"{source.path}: expected COCO captions with the lists 'images' and 'annotations'. Check data.path.")
    captions: dict[Any, list[Any]] = {}
    for number, annotation in enumerate(content["annotations"]):
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str)):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        else:
            index.ledger.drop(f"{source.name}/annotations#{number}", "malformed record", "expected image_id and caption")

    def read(record: dict[str, Any]) -> tuple[str, list[Any]]:
        return f"{record.get('split', '')}/{record['file_name']}".lstrip("/"), captions.get(record["id"], [])

    return content["images"], read


def llava_records(source: SourceSettings, index: IndexWriter) -> tuple[list[Any], Read]:
    """The caption is the first answer of the conversation."""
    content = read_json(Path(source.path), "LLaVA conversations")
    if not isinstance(content, list):
        raise UserError(f"{source.path}: expected a list of conversations, found a {type(content).__name__}. Check data.path.")

    def read(record: dict[str, Any]) -> tuple[str, list[Any]]:
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        return record["image"], answers[:1]

    return content, read
