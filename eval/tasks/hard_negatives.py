"""Compositional hard negatives: images and captions, right and wrong; are the ones that belong together nearer?

One item and one scoring serve every benchmark of that form; the files they come in differ, and each has its reader (here
SugarCrepe's, arXiv 2306.14610; the others are in `eval.tasks.hard_negative_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.features import Features
from eval.images import ImageFolder, ImageItem
from eval.measures import Measure, Record
from eval.settings import HardNegativeData
from eval.tasks import Scored, Task, TaskData
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import read_json, require_folder, sha256_text

SUBTASKS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
KINDS = ("replace", "swap", "add")

Side = ImageItem | str
"""One side of a similarity: an image or a caption."""


@dataclass(frozen=True)
class Contest:
    """Similarities of which some must be higher than others; what every benchmark of hard negatives asks."""

    subtask: str
    id: str
    pairs: tuple[tuple[Side, Side], ...]
    """What is compared, one similarity a pair; those that must be higher come first."""
    must_win: tuple[tuple[int, int], ...]
    """(i, j): the similarity of `pairs[i]` must be higher than that of `pairs[j]`."""
    cluster: str
    """What other items share with this one: the image, or the example that several scores are of."""
    shares_ties: bool = True
    """A right candidate tied with t others counts 1 / (1 + t). Otherwise a tie is wrong, as it is where several comparisons
    must hold at once."""
    official_tie: float = 0.0
    """What a tie counts under the official protocol: 1 where the benchmark's own script takes the first of equal candidates
    and the right one is the first."""
    groups: tuple[str, ...] = ()
    """Of which a table is made beside the subtasks (Winoground's tags)."""


def choice(subtask: str, identifier: str, image: ImageItem, captions: Sequence[str], official_tie: float = 0.0) -> Contest:
    """An image and candidate captions, the right one first."""
    must_win = tuple((0, wrong) for wrong in range(1, len(captions)))
    pairs = tuple((image, text) for text in captions)
    return Contest(subtask, identifier, pairs, must_win, image.name, official_tie=official_tie)


def open_images(settings: HardNegativeData, beside: Path, allow_missing: bool, task: str) -> ImageFolder:
    """The folder that was given, or `images` in the folder `beside`."""
    folder = require_folder(settings.images or beside / "images", f"the folder with the images of {task}")
    return ImageFolder(folder, allow_missing, f"{task}.images")


def read_sugarcrepe(settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """Those of the seven SugarCrepe files that exist in the folder.

    Raises:
        UserError: none of the files, a file of another form, an empty caption, an id that occurs twice, a missing image unless
            allowed, no item left.
    """
    folder = require_folder(given(settings.path, "sugarcrepe.path"), "a folder with SugarCrepe files")
    files = present_files(folder, {subtask: (subtask,) for subtask in SUBTASKS})
    images, items = open_images(settings, folder, allow_missing, "sugarcrepe"), []
    for subtask, file in files.items():
        for identifier, entry in read_entries(file).items():
            name, *captions = texts_of(entry, ("filename", "caption", "negative_caption"), f"{file}: item {identifier}")
            if image := images.find(name, f"{subtask}/{identifier}"):
                items.append(choice(subtask, identifier, image, captions))
    return contests(items, images)


def present_files(folder: Path, names: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    """The JSON file of each subtask, under the first of its names that exists. Raises UserError when there is none at all."""
    tried = {subtask: [folder / f"{name}.json" for name in known] for subtask, known in names.items()}
    found = {subtask: next((file for file in files if file.is_file()), None) for subtask, files in tried.items()}
    if not any(found.values()):
        raise UserError(f"{folder}: expected at least one of {', '.join(f'{known[0]}.json' for known in names.values())}.")
    return {subtask: file for subtask, file in found.items() if file}


def read_entries(file: Path) -> dict[str, Any]:
    """Items by their id, from a JSON object, or from a list: then by its field `id`, or else its place from 0.

    Raises:
        UserError: not JSON, no items, or an id that occurs twice.
    """
    entries = read_json(file, "a file of benchmark items", unique_keys(file))
    if isinstance(entries, list):
        entries = by_id(entries, file)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{file}: expected a non-empty object or list of items, found {str(entries)[:40]}.")
    return entries


def by_id(rows: Iterable[Any], file: Path) -> dict[str, Any]:
    """Rows of `file` by their field `id`, or else by their place from 0. Raises UserError for an id that occurs twice."""
    pairs = [(str(row.get("id", place) if isinstance(row, dict) else place), row) for place, row in enumerate(rows)]
    return unique_keys(file)(pairs)


def unique_keys(file: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes a dict of keys and values, and raises UserError naming `file` when a key occurs twice."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"{file}: the id or key '{key}' occurs twice; expected each once. Mend the file.")
            found[key] = value
        return found

    return made


def texts_of(entry: Any, keys: Sequence[str], where: str) -> tuple[str, ...]:
    """Non-empty texts under `keys`. Raises UserError naming `where` and the key."""
    for key in keys:
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: expected a non-empty text under '{key}', found {str(value)[:40]!r}.")
    return tuple(entry[key] for key in keys)


def contests(items: list[Contest], images: ImageFolder) -> TaskData:
    """The items and what they need encoded. Raises UserError when no item is left."""
    if not items:
        lost = f"{len(images.missing)} items have no image there" if images.missing else "the file has none that can be scored"
        raise UserError(f"{images.folder}: expected at least one item with its image, found none: {lost}.")
    sides = [side for item in items for pair in item.pairs for side in pair]
    texts = sorted({side for side in sides if isinstance(side, str)})
    unique = list({side.content_hash: side for side in sides if isinstance(side, ImageItem)}.values())
    lines = [f"{item.subtask}/{item.id} {[tuple(map(_key, pair)) for pair in item.pairs]} {item.must_win}" for item in items]
    notes = {"boxes partly outside their image": len(images.overhanging)} if images.overhanging else {}
    return TaskData(items, unique, texts, sha256_text("\n".join(sorted(lines))), images.missing, notes)


def _key(side: Side) -> str:
    return side.content_hash if isinstance(side, ImageItem) else side


def score_contests(data: TaskData, features: Features, as_lift_script: bool = False) -> list[Record]:
    """One record an item, right when each similarity that must be higher is.

    Args:
        as_lift_script: as LIFT's published SugarCrepe script, which applies to its own items only. A frozen text side is
            float16 and not normalised, similarities are rounded to float16, and an item whose image is not RGB is wrong, since
            the script fails there.
    """
    items: list[Contest] = data.items
    image_ND = features.images(data.images)
    text_TD = _script_texts(features, data.texts) if as_lift_script else features.texts(data.texts, "captions")
    dtype, official = text_TD.dtype, features.protocol == "official"
    row = {image.content_hash: image_ND[place].astype(dtype) for place, image in enumerate(data.images)}
    row |= dict(zip(data.texts, text_TD, strict=True))
    records = []
    for item in items:
        left_PD, right_PD = (np.stack([row[_key(pair[side])] for pair in item.pairs]).astype(np.float32) for side in (0, 1))
        scores_P = np.sum(left_PD * right_PD, axis=1).astype(dtype)
        correct, tied = outcome(item, scores_P, official)
        if as_lift_script and correct and not all(is_rgb(side) for side in item.pairs[0] if isinstance(side, ImageItem)):
            correct = 0.0
        records.append(Record(item.subtask, item.id, scores_P.tolist(), correct, item.cluster, tie=tied))
    return records


def outcome(item: Contest, scores_P: np.ndarray, official: bool = False) -> tuple[float, bool]:
    """What the item counts, 0 to 1, and whether a tie decided that."""
    margins = [scores_P[higher] - scores_P[lower] for higher, lower in item.must_win]
    if min(margins) != 0:
        return float(min(margins) > 0), False
    if official:
        return item.official_tie, True
    return (1 / (1 + margins.count(0)) if item.shares_ties else 0.0), True


def _script_texts(features: Features, texts: list[str]) -> np.ndarray:
    """[T, D]: what LIFT's SugarCrepe script compares: float16 and not normalised for a frozen text side, else normalised."""
    if features.encoder.has_frozen_text:
        return features.aligned_texts(texts, "captions").astype(np.float16)
    return features.texts(texts, "captions")


def is_rgb(image: ImageItem) -> bool:
    """By the file's header. A grey or CMYK photo has another number of channels than the official script normalises."""
    return image.header()[0] == "RGB"


def score_sugarcrepe(data: TaskData, features: Features) -> Scored:
    """The subtasks, the mean of each kind and of all seven (the published averages), and all items together."""
    records = score_contests(data, features, as_lift_script=features.protocol == "official")
    found = {record.subtask for record in records}
    present = [name for name in SUBTASKS if name in found]
    measures = [Measure(name, (name,)) for name in present]
    for kind in KINDS:
        subtasks = tuple(name for name in present if name.startswith(kind))
        measures += [Measure(kind, subtasks, macro=True)] if len(subtasks) > 1 else []
    return Scored(records, [*measures, Measure("average", tuple(present), macro=True), Measure("all")])


SUGARCREPE = Task(read_sugarcrepe, score_sugarcrepe, "sugarcrepe")
