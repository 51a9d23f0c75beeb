"""Items an encoder is measured on: SugarCrepe files with their images, and held-out pairs in img2dataset's tar layout.

Every fault of an item is an error that names it: two encoders are comparable only on the same items. Missing images may be
allowed, and are then listed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lift.common.errors import UserError
from lift.common.files import read_json, require_folder, sha256_file, sha256_text
from lift.common.images import ImageFault, decode_image
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.sources import read_sources

SUBTASKS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


@dataclass(frozen=True)
class HardNegative:
    subtask: str
    id: str
    image: Path
    caption: str
    negative_caption: str


@dataclass
class HardNegatives:
    items: list[HardNegative] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Items left out because their image is not there, as `subtask/id`."""
    data_hash: str = ""
    """Over the files and the images used."""


@dataclass(frozen=True)
class Pair:
    key: str
    image: bytes
    """Encoded."""
    caption: str


def read_hard_negatives(folder: Path, images: Path, allow_missing: bool) -> HardNegatives:
    """Those of the seven SugarCrepe files that exist in `folder`.

    Raises:
        UserError: none of the files, a file of another form, an empty caption, a missing image unless allowed, no item left.
    """
    require_folder(folder, "a folder with SugarCrepe files")
    require_folder(images, "the folder with the images of the SugarCrepe files")
    files = [folder / f"{subtask}.json" for subtask in SUBTASKS if (folder / f"{subtask}.json").is_file()]
    if not files:
        raise UserError(f"{folder}: expected at least one of {', '.join(f'{name}.json' for name in SUBTASKS)}, found none.")
    found = HardNegatives()
    for file in files:
        entries = read_json(file, "a SugarCrepe file")
        if not isinstance(entries, dict) or not entries:
            raise UserError(f"{file}: expected a non-empty object of items by id, found {str(entries)[:40]}.")
        for identifier, entry in entries.items():
            _add_item(found, file, identifier, entry, images, allow_missing)
    if not found.items:
        raise UserError(f"{images}: expected the images of {folder}, found none of them ({len(found.missing)} items).")
    used = sorted({item.image for item in found.items})
    found.data_hash = sha256_text("\n".join(f"{path.name} {sha256_file(path)}" for path in [*files, *used]))
    return found


def _add_item(found: HardNegatives, file: Path, identifier: str, entry: object, images: Path, allow_missing: bool) -> None:
    keys = ("filename", "caption", "negative_caption")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key].strip() for key in keys):
        raise UserError(f"{file}: item {identifier}: expected non-empty texts under {', '.join(keys)}.")
    image = images / entry["filename"]
    if image.is_file():
        found.items.append(HardNegative(file.stem, identifier, image, entry["caption"], entry["negative_caption"]))
    elif allow_missing:
        found.missing.append(f"{file.stem}/{identifier}")
    else:
        raise UserError(
            f"{image}: expected the image of {file.name} item {identifier}. Check --images, or give --allow_missing."
        )


def read_pairs(folder: Path) -> tuple[list[Pair], str]:
    """All pairs of the webdataset tars in `folder`, with the first caption of each, and the data's hash.

    Raises:
        UserError: no tar, an unreadable tar, a key without image or caption, no pair.
    """
    ledger = DropLedger()
    shards = read_sources([SourceSettings(kind="webdataset", path=str(folder), name=folder.name)], ledger)
    if len(ledger):
        key, cause, _ = ledger.rows()[0]
        raise UserError(f"{folder}: key {key}: {cause}. Two encoders are comparable only on the same pairs; mend or remove it.")
    samples = [sample for shard in shards for sample in shard.samples]
    pairs = [Pair(sample.key, sample.image.read(), next(iter(sample.captions.values()))) for sample in samples]
    lines = [f"{pair.key} {hashlib.sha256(pair.image).hexdigest()} {pair.caption}" for pair in pairs]
    return pairs, sha256_text("\n".join(lines))


def decode(source: Path | bytes, name: str) -> Image.Image:
    """An RGB image. Raises UserError, naming `name`, when it cannot be decoded."""
    try:
        return decode_image(source)
    except (OSError, ImageFault) as error:
        raise UserError(f"{name}: expected an image, but it cannot be decoded: {error}") from error
