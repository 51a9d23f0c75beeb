"""An image of a benchmark: where its bytes are, what they hash to, and the part of it that is meant."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lift.common.errors import UserError
from lift.common.files import sha256_bytes, sha256_text
from lift.common.images import FORMATS, ImageFault, decode_image

Box = tuple[int, int, int, int]
"""Left, upper, right, lower in pixels, as PIL's `crop` takes it."""


@dataclass(frozen=True)
class ImageItem:
    name: str
    """Path or key, for messages and records."""
    read: Callable[[], bytes]
    content_hash: str
    """sha256 of the bytes and of the box."""
    box: Box | None = None
    """Only this part is shown to the encoder (ARO crops relations)."""

    def load(self) -> Image.Image:
        """Upright RGB; a box is cut from the image as stored, which is what its coordinates are of.

        Raises:
            UserError: naming the image, when it cannot be decoded or most of the box lies outside it.
        """
        if self.box is not None:
            with self._opened() as stored:
                return self._decoded(stored).crop(inside(self.box, stored.size, self.name)).convert("RGB")
        try:
            return decode_image(self.read())
        except (OSError, ImageFault) as error:
            raise self._fault(error) from error

    def load_as_stored(self) -> Image.Image:
        """As PIL opens it, neither turned nor converted, which is what the official scripts see. Outside the image a box is
        black."""
        image = self._decoded(self._opened())
        return image if self.box is None else image.crop(self.box)

    def header(self) -> tuple[str, tuple[int, int]]:
        """PIL's mode, and width and height as stored; no pixel is decoded. Raises UserError when the header cannot be read."""
        with self._opened() as image:
            return image.mode, image.size

    def _opened(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.read()), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise self._fault("it is none of " + ", ".join(FORMATS)) from error
        except (OSError, Image.DecompressionBombError) as error:
            raise self._fault(error) from error

    def _decoded(self, image: Image.Image) -> Image.Image:
        try:
            image.load()
        except OSError as error:
            raise self._fault(error) from error
        return image

    def _fault(self, why: object) -> UserError:
        return UserError(
            f"{self.name}: expected an image, but it cannot be decoded: {why}. Mend it, or remove it and give --allow_missing."
        )


def inside(box: Box, size: tuple[int, int], where: str) -> Box:
    """The part of `box` that lies in an image of `size` (width, height), since annotated boxes overhang by some pixels.

    Raises:
        UserError: naming `where`, for an empty box or one with less than half of its area in the image.
    """
    left, upper, right, lower = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    if area == 0 or max(right - left, 0) * max(lower - upper, 0) * 2 < area:
        raise UserError(
            f"{where}: expected a box inside an image of {size[0]} x {size[1]} pixels, found {list(box)}. "
            "The annotations may be of other images, or of images of another size; use the original ones."
        )
    return left, upper, right, lower


def image_item(path: Path, box: Box | None = None) -> ImageItem:
    """The image in a file. Raises OSError when it cannot be read."""
    return image_from(str(path), partial(Path.read_bytes, path), box)


def image_from(name: str, read: Callable[[], bytes], box: Box | None = None) -> ImageItem:
    """An image whose bytes `read` gives, again at each call."""
    whole = ImageItem(name, read, sha256_bytes(read()))
    return whole if box is None else part_of(whole, box)


def part_of(image: ImageItem, box: Box) -> ImageItem:
    """The box of a whole image, which is not read for it."""
    return replace(image, content_hash=sha256_text(f"{image.content_hash} {list(box)}"), box=box)


class ImageFolder:
    """Images of a benchmark below one folder; each file is read and hashed once.

    Args:
        setting: what the folder was given as, for messages.
    """

    def __init__(self, folder: Path, allow_missing: bool, setting: str) -> None:
        self.folder, self.allow_missing, self.setting = folder, allow_missing, setting
        self.missing: list[str] = []
        self.overhanging: list[str] = []
        """Items whose box is partly outside the image."""
        self._known: dict[str, ImageItem | None] = {}
        self._size: dict[str, tuple[int, int]] = {}

    def find(self, name: str, item: str, box: Box | None = None) -> ImageItem | None:
        """The image `name` of `item`; None, and counted, when it is not there and that is allowed.

        Raises:
            UserError: it is not there, cannot be read, or its name leads out of the folder; the box is not in the image.
        """
        if name not in self._known:
            self._known[name] = self._open(name, item)
        image = self._known[name]
        if image is None:
            self.missing.append(item)
            return None
        if box is None:
            return image
        if name not in self._size:
            self._size[name] = image.header()[1]
        if inside(box, self._size[name], f"{item} ({image.name})") != box:
            self.overhanging.append(item)
        return part_of(image, box)

    def _open(self, name: str, item: str) -> ImageItem | None:
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{item}: expected the name of an image below {self.folder}, found '{name}'.")
        try:
            return image_item(path)
        except FileNotFoundError as error:
            if self.allow_missing:
                return None
            raise UserError(
                f"{path}: expected the image of {item}, but there is none. Check --{self.setting}, or give --allow_missing "
                "to score the items whose image is there."
            ) from error
        except (OSError, ValueError) as error:  # ValueError: no file can have that name
            raise UserError(f"{path}: expected the image of {item}, but it cannot be read: {error}") from error
