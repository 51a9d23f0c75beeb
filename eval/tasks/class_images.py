"""Images in classes: a folder with one folder a class, or webdataset tars with labels, and the classes' names by file.

Bytes are read when they are needed, from a file or at an offset of a tar; nothing is extracted.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.images import ImageItem, image_from
from lift.common.errors import UserError
from lift.common.files import read_json, sha256_text
from lift.common.ledger import DropLedger
from lift.sources.samples import ImageLocation
from lift.sources.webdataset import IMAGE_SUFFIXES, read_members

WORDNET_ID = re.compile(r"n\d{8}")
READERS = 8
"""Threads that read and hash images: most of the time is waiting for the disk."""


@dataclass
class LabelledImages:
    """N images, each of one of C classes."""

    classes: list[str]
    """Identifiers, all different: folder names, or what a tar's labels stand for. [C]"""
    names: list[str]
    """What the classes are called in a prompt; two may be equal. [C]"""
    named: bool
    """False when the names are only numbers or WordNet ids, which say nothing to a text encoder."""
    ids: list[str]
    """Path below the folder, or TAR/KEY. [N]"""
    images: list[ImageItem]
    label_N: np.ndarray
    """int64, row of `classes`."""
    missing: list[str]
    """Ids of images that cannot be read, where that is allowed."""
    notes: dict[str, Any] = field(default_factory=dict)

    def titles(self) -> list[str]:
        """Names, with the identifier behind where two classes share one. [C]"""
        count = Counter(self.names)
        return [
            name if count[name] == 1 else f"{name} ({identifier})"
            for name, identifier in zip(self.names, self.classes, strict=True)
        ]

    def content_hash(self) -> str:
        rows = zip(self.ids, self.images, self.label_N, strict=True)
        lines = sorted(f"{identifier} {image.content_hash} {self.classes[label]}" for identifier, image, label in rows)
        return sha256_text("\n".join([*lines, str(self.classes), str(self.names)]))


@dataclass(frozen=True)
class ClassFile:
    """The classes' names as a file gives them."""

    path: Path
    folders: list[str] | None
    """Identifier of each class; None for a plain list."""
    names: list[str]
    numbered: bool
    """Whether an integer label is a row of this file: in a list and in a class index, not in {folder: name}."""

    def row(self, label: str, where: str) -> int:
        """Of an integer (where it means a row), a folder, or a name. Raises UserError naming `where`."""
        if self.numbered and re.fullmatch(r"-?\d+", label):
            if 0 <= int(label) < len(self.names):
                return int(label)
            raise UserError(
                f"{where}: label out of range: expected 0 to {len(self.names) - 1}, the classes of {self.path}, found {label}. "
                "Is it the class file of these images?"
            )
        if self.folders is not None and label in self.folders:
            return self.folders.index(label)
        if self.names.count(label) == 1:
            return self.names.index(label)
        raise UserError(f"{where}: expected a class that {self.path} names, found '{label}'. Add it there, or check the file.")


def read_class_file(path: Path) -> ClassFile:
    """A JSON list of names, {folder: name}, or {index: [folder, name]} as ImageNet's class index.

    Raises:
        UserError: another form, an empty name, a folder twice, indexes other than 0 to C - 1.
    """
    content = read_json(path, "a JSON file with the classes' names")
    form = "a JSON list of names, {folder: name}, or {index: [folder, name]}"
    if isinstance(content, list) and content and all(_is_text(name) for name in content):
        return ClassFile(path, None, content, True)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected {form}, found {str(content)[:60]}.")
    if all(_is_text(name) for name in content.values()):
        return ClassFile(path, list(content), list(content.values()), False)
    for key, value in content.items():
        if not (isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))):
            raise UserError(f"{path}: expected {form}, found {key!r}: {str(value)[:60]}.")
    if set(content) != {str(row) for row in range(len(content))}:
        raise UserError(f"{path}: expected the indexes 0 to {len(content) - 1}, found {', '.join(list(content)[:3])}, ...")
    pairs = [content[str(row)] for row in range(len(content))]
    folders = [folder for folder, _ in pairs]
    if twice := [folder for folder, count in Counter(folders).items() if count > 1]:
        raise UserError(f"{path}: the folder '{twice[0]}' has two classes; expected one. Mend the file.")
    return ClassFile(path, folders, [name for _, name in pairs], True)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def read_class_images(path: Path, class_file: Path | None, allow_missing: bool = False) -> LabelledImages:
    """Images below `path`: a folder of class folders, a tar, or a folder of tars (when it has no folders).

    Raises:
        UserError: nothing there, no class folders, a class without images, a label or folder that the class file does not
            name, and an image that cannot be read unless that is allowed.
    """
    file = None if class_file is None else read_class_file(class_file)
    tars = [path] if path.is_file() else []
    if not tars and path.is_dir() and not _class_folders(path):
        tars = sorted(entry for entry in path.glob("*.tar") if not entry.name.startswith("."))
    found = _in_tars(path, tars, file, allow_missing) if tars else _in_folders(path, file)
    return _opened(path, *found, allow_missing=allow_missing)


@dataclass
class _Classes:
    identifiers: list[str]
    names: list[str]
    named: bool


@dataclass
class _Found:
    """An image before it is read."""

    id: str
    location: ImageLocation
    label: int


def _class_folders(path: Path) -> list[Path]:
    """In the order that torchvision's ImageFolder numbers them."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _in_folders(path: Path, file: ClassFile | None) -> tuple[_Classes, list[_Found], dict[str, Any]]:
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with one folder of images a class, or webdataset tars; it is not there.")
    folders = _class_folders(path)
    if not folders:
        raise UserError(f"{path}: expected one folder of images a class, or tars (*.tar), found neither.")
    names = _folder_names(path, [folder.name for folder in folders], file)
    found: list[_Found] = []
    empty: list[str] = []
    others = sum(entry.is_file() and not entry.name.startswith(".") for entry in path.iterdir())
    for label, folder in enumerate(folders):
        images, more = _image_files(folder)
        others += more
        if not images:
            empty.append(folder.name)
        for image in images:
            found.append(_Found(image.relative_to(path).as_posix(), ImageLocation(str(image)), label))
    if empty:
        raise UserError(
            f"{path / empty[0]}: expected images of a class, found none ({len(empty)} such folders below {path}: "
            f"{', '.join(empty[:3])}). Remove the folder, or fetch its images."
        )
    named = file is not None or not all(WORDNET_ID.fullmatch(folder.name) for folder in folders)
    return _Classes([folder.name for folder in folders], names, named), found, {"other_files": others}


def _folder_names(path: Path, folders: list[str], file: ClassFile | None) -> list[str]:
    if file is None:
        return folders
    if file.folders is None and not all(map(str.isdigit, folders)):
        if len(file.names) != len(folders):
            raise UserError(
                f"{file.path}: expected a name for each of the {len(folders)} folders of {path} in their sorted order, found "
                f"{len(file.names)}. Give {{folder: name}} to name them one by one."
            )
        return file.names
    if file.folders is not None and (unknown := [folder for folder in folders if folder not in file.folders]):
        raise UserError(
            f"{file.path}: expected a name for the folder '{unknown[0]}' of {path}, found none ({len(unknown)} folders without "
            "a name). Add them, or check the file."
        )
    return [
        file.names[file.folders.index(folder) if file.folders is not None else file.row(folder, str(path))]
        for folder in folders
    ]


def _image_files(folder: Path) -> tuple[list[Path], int]:
    """Images at any depth, sorted, and the number of other files; what is hidden is passed over."""
    images: list[Path] = []
    others = 0
    for place, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        shown = sorted(name for name in files if not name.startswith("."))
        kept = [name for name in shown if Path(name).suffix[1:].lower() in IMAGE_SUFFIXES]
        images += [Path(place) / name for name in kept]
        others += len(shown) - len(kept)
    return images, others


def _in_tars(
    path: Path, tars: Sequence[Path], file: ClassFile | None, allow_missing: bool
) -> tuple[_Classes, list[_Found], dict[str, Any]]:
    labels: list[str] = []
    places: list[tuple[str, ImageLocation]] = []
    missing: list[str] = []
    others, ledger = 0, DropLedger()
    for tar in tars:
        for stem, parts in read_members(str(tar), ledger, frozenset({"cls"})).items():
            identifier = f"{tar.stem}/{stem}"
            image = next((parts[suffix] for suffix in parts if suffix in IMAGE_SUFFIXES), None)
            others += sum(suffix != "cls" and suffix not in IMAGE_SUFFIXES for suffix in parts)
            if image is None and "cls" in parts:
                missing.append(identifier)
            elif image is not None and "cls" not in parts:
                raise UserError(f"{identifier}: expected the label of the image in a member {stem}.cls, found none in {tar}.")
            elif image is not None:
                labels.append(parts["cls"].decode("utf-8", errors="replace").strip())
                places.append((identifier, ImageLocation(str(tar), *image)))
    if missing and not allow_missing:
        raise UserError(
            f"{missing[0]}: expected an image beside the label, found none. Fetch the tar again or --allow_missing."
        )
    if not places:
        raise UserError(f"{path}: expected images KEY.jpg with labels KEY.cls in its tars, found none.")
    classes, label_N = _tar_classes(labels, [identifier for identifier, _ in places], file)
    found = [_Found(identifier, place, label) for (identifier, place), label in zip(places, label_N, strict=True)]
    notes = {"other_files": others, "labels_without_image": missing, "unsafe_names": len(ledger)}
    return classes, found, notes


def _tar_classes(labels: list[str], ids: list[str], file: ClassFile | None) -> tuple[_Classes, list[int]]:
    """All classes of the file, whether or not there are images of each; without a file those that occur."""
    if file is not None:
        rows: dict[str, int] = {}
        for label, identifier in zip(labels, ids, strict=True):
            if label not in rows:
                rows[label] = file.row(label, identifier)
        identifiers = file.folders or [str(row) for row in range(len(file.names))]
        return _Classes(identifiers, file.names, True), [rows[label] for label in labels]
    if empty := [identifier for label, identifier in zip(labels, ids, strict=True) if not label]:
        raise UserError(f"{empty[0]}: expected a class in the .cls member, an integer or a name, found nothing.")
    numbers = all(label.isdigit() for label in labels)
    distinct = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    row = {label: number for number, label in enumerate(distinct)}
    named = not numbers and not all(WORDNET_ID.fullmatch(label) for label in distinct)
    return _Classes(distinct, distinct, named), [row[label] for label in labels]


def _opened(path: Path, classes: _Classes, found: list[_Found], notes: dict[str, Any], allow_missing: bool) -> LabelledImages:
    """Reads and hashes every image once; what cannot be read is an error, or left out and named."""
    with ThreadPoolExecutor(READERS) as pool:
        opened = list(pool.map(_image_or_error, found))
    missing = list(notes.pop("labels_without_image", []))
    for entry, image in zip(found, opened, strict=True):
        if isinstance(image, OSError):
            if not allow_missing:
                raise UserError(
                    f"{entry.location.path}: expected the image of {entry.id}, but it cannot be read: {image}. Mend or remove "
                    "it, or give --allow_missing."
                ) from image
            missing.append(entry.id)
    kept = [(entry, image) for entry, image in zip(found, opened, strict=True) if isinstance(image, ImageItem)]
    if not kept:
        raise UserError(f"{path}: expected images, but none of the {len(found)} can be read.")
    label_N = np.array([entry.label for entry, _ in kept], np.int64)
    notes = {"images": len(kept), "classes": len(classes.names), "classes_with_images": len(set(label_N.tolist()))} | notes
    ids, images = [entry.id for entry, _ in kept], [image for _, image in kept]
    return LabelledImages(classes.identifiers, classes.names, classes.named, ids, images, label_N, missing, notes)


def _image_or_error(entry: _Found) -> ImageItem | OSError:
    try:
        return image_from(entry.id if entry.location.size >= 0 else entry.location.path, entry.location.read)
    except OSError as error:
        return error
