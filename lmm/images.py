"""Where the images of conversations lie: in a folder, in tars, or in the rows of a table.

In: the name that a row gives. Out: a small reference that can be sent to another process, and from it the decoded image. Tars
are read by offset and never extracted, so that the name of a member never becomes a path.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import numpy as np
from PIL import Image

from lift.common.errors import UserError
from lift.common.images import ImageFault, decode_image
from lift.common.tars import tar_files
from lmm.faults import SampleFault


@dataclass(frozen=True)
class TarMember:
    """`size` bytes at `offset` of `tar`."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


@dataclass(frozen=True)
class StoredImage:
    """The encoded image itself, as a table row holds it; `name` is for messages."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


ImageReference = Path | TarMember | StoredImage


class ImageStore(Protocol):
    def find(self, name: str) -> ImageReference:
        """Raises SampleFault when there is no such image, or its name leads outside."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """Files below `folder`; whether a file is there shows when it is read."""

    folder: Path

    def find(self, name: str) -> Path:
        path = self.folder / name  # an absolute name takes the folder's place
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(self.folder):
            raise SampleFault("image outside its folder", name)
        return path


@dataclass(frozen=True)
class NamedImages:
    """Images of which only the names matter, because they are counted and not read."""

    def find(self, name: str) -> Path:
        return Path(name)


class TarImages:
    """Members of uncompressed tars, found by name.

    The index is four arrays, 36 bytes a member: loader workers share its pages with the process that made it, where a dict
    of as many strings would be copied into each of them as its reference counts change.

    Raises:
        UserError: a file is not a whole, uncompressed tar, or two members have the same name.
    """

    def __init__(self, tars: list[Path]) -> None:
        self.tars = tars
        found = [(_digest(name), number, *place) for number, tar in enumerate(tars) for name, place in _members(tar)]
        table = np.array(found, dtype=[("digest", "S16"), ("tar", "i4"), ("offset", "i8"), ("size", "i8")])
        self._table = table[np.argsort(table["digest"], kind="stable")]
        repeated = np.flatnonzero(self._table["digest"][1:] == self._table["digest"][:-1])
        if len(repeated):
            places = self._table[repeated[0] : repeated[0] + 2]
            where = " and ".join(f"byte {place['offset']} of {tars[place['tar']]}" for place in places)
            raise UserError(f"{tars[0].parent}: two images have the same name, at {where}. Remove one of them.")

    def __len__(self) -> int:
        return len(self._table)

    def find(self, name: str) -> TarMember:
        digest = np.bytes_(_digest(_plain(name)))
        row = int(np.searchsorted(self._table["digest"], digest))
        if row == len(self._table) or self._table["digest"][row] != digest:
            raise SampleFault("missing image", f"no member {name} in {', '.join(tar.name for tar in self.tars[:3])}")
        entry = self._table[row]
        return TarMember(self.tars[entry["tar"]], name, int(entry["offset"]), int(entry["size"]))


def open_images(path: Path, what: str) -> ImageStore:
    """The store at `path`: a tar, a folder with tars in it, or a folder of images.

    Raises:
        UserError: there is nothing, a file that is no tar, or a damaged tar.
    """
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return _tar_images(tuple((tar, tar.stat().st_mtime_ns) for tar in tars)) if tars else FolderImages(path)
    if not path.is_file():
        raise UserError(f"{path}: expected {what}, a folder or a tar, but there is no such folder. Check the path.")
    return _tar_images(((path, path.stat().st_mtime_ns),))


@lru_cache(maxsize=8)
def _tar_images(tars: tuple[tuple[Path, int], ...]) -> TarImages:
    """Kept, because a command looks at its sources several times; the time of change tells a new file from the old."""
    return TarImages([tar for tar, _ in tars])


def _members(tar: Path) -> list[tuple[str, tuple[int, int]]]:
    with tar.open("rb") as file:
        return [(_plain(member.name), (member.offset_data, member.size)) for member in tar_files(file, str(tar))]


def _plain(name: str) -> str:
    """Without the `./` that tar puts before names when it is given a folder."""
    return PurePosixPath(name).as_posix()


def _digest(name: str) -> bytes:
    # numpy takes zero bytes at the end of a string for its padding
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=15).digest() + b"\x01"


def image_size_in_bytes(image: ImageReference) -> int:
    """-1 when it is a file that is not there."""
    if isinstance(image, Path):
        return image.stat().st_size if image.is_file() else -1
    return image.size if isinstance(image, TarMember) else len(image.content)


def load_image(image: ImageReference) -> Image.Image:
    """RGB image, wholly decoded. Raises SampleFault when it is missing or cannot be decoded to its end."""
    try:
        if isinstance(image, Path):
            return decode_image(image)
        return decode_image(_read(image) if isinstance(image, TarMember) else image.content)
    except FileNotFoundError as error:
        raise SampleFault("missing image", str(image)) from error
    except ImageFault as error:
        raise SampleFault("undecodable image", f"{image}: {error}") from error
    except ValueError as error:  # no file can have that name
        raise SampleFault("missing image", f"{str(image)!r}: {error}") from error


def _read(member: TarMember) -> bytes:
    file = _opened(member.tar, os.getpid())
    content = os.pread(file.fileno(), member.size, member.offset)
    if len(content) != member.size:
        raise ImageFault(f"expected {member.size} bytes at byte {member.offset}, found {len(content)}; the tar has changed")
    return content


@lru_cache(maxsize=64)
def _opened(tar: Path, process: int) -> IO[bytes]:
    """A forked process opens its own. A file is closed when it leaves the cache."""
    return tar.open("rb")
