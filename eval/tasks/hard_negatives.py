"""Compositional hard negatives: one image and its captions, right and wrong; is the right one nearer?

One item and one scoring serve every benchmark of that form; the files they come in differ, and each has its reader. SugarCrepe:
arXiv 2306.14610.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.features import Features
from eval.images import ImageFolder, ImageItem
from eval.measures import Measure, Record
from eval.settings import HardNegativeData, given
from eval.tasks import Scored, Task, TaskData
from lift.common.errors import UserError
from lift.common.files import read_json, require_folder, sha256_text
from lift.common.images import FORMATS

SUBTASKS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
KINDS = ("replace", "swap", "add")


@dataclass(frozen=True)
class Choice:
    """An image and candidate captions, the right one first."""

    subtask: str
    id: str
    image: ImageItem
    captions: tuple[str, ...]


def read_sugarcrepe(settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """Those of the seven SugarCrepe files that exist in the folder.

    Raises:
        UserError: none of the files, a file of another form, an empty caption, a missing image unless allowed, no item left.
    """
    folder = require_folder(given(settings.path, "sugarcrepe.path"), "a folder with SugarCrepe files")
    image_folder = require_folder(settings.images or folder / "images", "the folder with the images of the SugarCrepe files")
    files = [folder / f"{subtask}.json" for subtask in SUBTASKS if (folder / f"{subtask}.json").is_file()]
    if not files:
        raise UserError(f"{folder}: expected at least one of {', '.join(f'{name}.json' for name in SUBTASKS)}, found none.")
    images, items = ImageFolder(image_folder, allow_missing, "sugarcrepe.images"), []
    for file in files:
        for identifier, entry in read_entries(file).items():
            texts = texts_of(entry, ("filename", "caption", "negative_caption"), f"{file}: item {identifier}")
            if image := images.find(texts[0], f"{file.stem}/{identifier}"):
                items.append(Choice(file.stem, identifier, image, texts[1:]))
    return choices(items, images)


def read_entries(file: Path) -> dict[str, Any]:
    """Items by their id, from a JSON object, or from a list (ids are then row numbers)."""
    entries = read_json(file, "a file of benchmark items")
    if isinstance(entries, list):
        entries = {str(number): entry for number, entry in enumerate(entries)}
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{file}: expected a non-empty object or list of items, found {str(entries)[:40]}.")
    return entries


def texts_of(entry: Any, keys: Sequence[str], where: str) -> tuple[str, ...]:
    """Non-empty texts under `keys`. Raises UserError naming `where` and the key."""
    for key in keys:
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: expected a non-empty text under '{key}', found {str(value)[:40]!r}.")
    return tuple(entry[key] for key in keys)


def choices(items: list[Choice], images: ImageFolder) -> TaskData:
    """Raises UserError when no item is left, or an id occurs twice in a subtask."""
    if not items:
        raise UserError(f"{images.folder}: expected images of the items, found none of them ({len(images.missing)} items).")
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.subtask, item.id) in seen:
            raise UserError(f"{item.subtask}: the id '{item.id}' occurs twice; expected one item an id. Mend the file.")
        seen.add((item.subtask, item.id))
    texts = sorted({text for item in items for text in item.captions})
    unique = list({item.image.content_hash: item.image for item in items}.values())
    lines = [f"{item.subtask}/{item.id} {item.image.content_hash} {item.captions}" for item in items]
    return TaskData(items, unique, texts, sha256_text("\n".join(sorted(lines))), images.missing)


def score_choices(data: TaskData, features: Features) -> list[Record]:
    """An item is right when its caption is nearer than every other; tied with t others it counts 1 / (1 + t): half for one.

    Official protocol: the text side is not normalised, similarities of a LIFT encoder are float16, a tie is wrong, and so is an
    item whose image is not RGB, since the script fails there.
    """
    items: list[Choice] = data.items
    image_ND, text_TD = features.images(data.images), caption_features(features, data.texts)
    image_row = {image.content_hash: row for row, image in enumerate(data.images)}
    text_row = {text: row for row, text in enumerate(data.texts)}
    official = features.protocol == "official"
    records = []
    for item in items:
        vector_D = image_ND[image_row[item.image.content_hash]].astype(text_TD.dtype)
        candidates_CD = text_TD[[text_row[text] for text in item.captions]]
        scores_C = np.sum(candidates_CD * vector_D, axis=1, dtype=np.float32).astype(text_TD.dtype)
        tied = int(np.sum(scores_C[1:] == scores_C[0])) if scores_C[0] >= scores_C[1:].max() else 0
        correct = float(scores_C[0] > scores_C[1:].max())
        if tied and not official:
            correct = 1 / (1 + tied)
        if official and correct and not is_rgb(item.image):
            correct = 0.0
        records.append(Record(item.subtask, item.id, scores_C.tolist(), correct, item.image.name, tie=tied > 0))
    return records


def caption_features(features: Features, texts: list[str]) -> np.ndarray:
    """[N, D]: normalised float32, or what the official SugarCrepe script compares (float16 and not normalised for LIFT)."""
    if features.protocol == "official" and features.encoder.has_frozen_text:
        return features.aligned_texts(texts, "captions").astype(np.float16)
    return features.texts(texts, "captions")


def is_rgb(image: ImageItem) -> bool:
    """By the file's header. A grey or CMYK photo has another number of channels than the official scripts normalise."""
    with Image.open(io.BytesIO(image.read()), formats=FORMATS) as opened:
        return opened.mode == "RGB"


def score_sugarcrepe(data: TaskData, features: Features) -> Scored:
    """The subtasks, the mean of each kind and of all seven (the published averages), and all items together."""
    records = score_choices(data, features)
    present = [name for name in SUBTASKS if any(record.subtask == name for record in records)]
    measures = [Measure(name, (name,)) for name in present]
    for kind in KINDS:
        subtasks = tuple(name for name in present if name.startswith(kind))
        measures += [Measure(kind, subtasks, macro=True)] if len(subtasks) > 1 else []
    return Scored(records, [*measures, Measure("average", tuple(present), macro=True), Measure("all")])


SUGARCREPE = Task(read_sugarcrepe, score_sugarcrepe, "sugarcrepe")
