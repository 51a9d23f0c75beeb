"""Any Hugging Face `datasets` table with an image and a caption column: a hub name, a folder it loads, or one saved to disk."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from lift.common.errors import UserError, first_line
from lift.settings import SourceSettings
from lift.sources.index import IndexWriter, Origin
from lift.sources.samples import TableImage
from lift.sources.storage import read_ranges

SAVED_TO_DISK = ("state.json", "dataset_dict.json")

images_apart = False


def origins(source: SourceSettings) -> list[Origin]:
    return [Origin(source.split, source.path)]


def fingerprint(source: SourceSettings, origin: Origin) -> str:
    return str(_table(source.path, source.split)._fingerprint)


def scan(source: SourceSettings, origin: Origin, index: IndexWriter) -> None:
    table = _table(source.path, source.split)
    fields = source.caption_fields or ["caption"]
    wanted = {*fields, source.image_field, *([source.key_field] if source.key_field else [])}
    if missing := sorted(wanted - set(table.column_names)):
        raise UserError(
            f"{source.path}: the table has no column {missing[0]}; it has {', '.join(table.column_names)}. "
            "Set data.image_field, data.caption_fields or data.key_field."
        )
    texts = table.select_columns([*fields, *([source.key_field] if source.key_field else [])])
    has_image = table.with_format("arrow")[source.image_field]
    row = 0
    for chunk in _batches(has_image):
        for image, record in zip(chunk, texts.select(range(row, row + len(chunk))), strict=True):
            key = f"{source.name}/{record[source.key_field] if source.key_field else f'{row:09d}'}"
            captions: list[Any] = []
            for field in fields:
                captions += record[field] if isinstance(record[field], list) else [record[field]]
            index.add(key, captions, source.path if image else None, offset=row)
            row += 1


def read_image(image: TableImage) -> bytes:
    """Raises OSError when the row holds neither bytes nor the path of a file that is there."""
    stored = _images(image.path, image.split, image.column)[image.row][image.column]
    if stored["bytes"]:
        return stored["bytes"]
    return read_ranges([(stored["path"], 0, -1)])[0]


def _batches(column: Any, rows: int = 1000) -> Any:
    """Whether each image is there, `rows` at a time."""
    for start in range(0, len(column), rows):
        yield column[start : start + rows].is_valid().to_pylist()


@lru_cache(maxsize=8)
def _images(path: str, split: str, column: str) -> Any:
    """The table's images alone, not decoded."""
    import datasets

    return _table(path, split).select_columns([column]).cast_column(column, datasets.Image(decode=False))


@lru_cache(maxsize=8)
def _table(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("a source of kind hf_dataset needs the package datasets. Run: pip install datasets") from error
    try:
        if any((Path(path) / name).is_file() for name in SAVED_TO_DISK):
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: datasets cannot load the split {split}: {first_line(error)}. Check data.path and data.split."
        ) from error
    return loaded
