"""An image of a benchmark: where its bytes are, what they hash to, and the part of it that is meant."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
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
        """Upright RGB. Raises UserError, naming the image, when it cannot be decoded or the box lies outside it."""
        try:
            image = decode_image(self.read())
        except (OSError, ImageFault) as error:
            raise UserError(f"{self.name}: expected an image, but it cannot be decoded: {error}") from error
        if self.box is None:
            return image
        left, upper, right, lower = self.box
        if not (0 <= left < right <= image.width and 0 <= upper < lower <= image.height):
            raise UserError(
                f"{self.name}: expected a box inside its {image.width} x {image.height} pixels, found {list(self.box)}. "
                "The annotations are of other images; use the original ones."
            )
        return image.crop(self.box)

    def load_as_stored(self) -> Image.Image:
        """As PIL opens it, neither turned nor converted, which is what the official scripts see."""
        try:
            image = Image.open(io.BytesIO(self.read()), formats=FORMATS)
            image.load()
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{self.name}: expected an image, but it cannot be decoded: {error}") from error
        return image if self.box is None else image.crop(self.box)


def image_item(path: Path, box: Box | None = None) -> ImageItem:
    """The image in a file. Raises OSError when it cannot be read."""
    return image_from(str(path), partial(Path.read_bytes, path), box)


def image_from(name: str, read: Callable[[], bytes], box: Box | None = None) -> ImageItem:
    """An image whose bytes `read` gives, again at each call."""
    content = sha256_bytes(read())
    return ImageItem(name, read, content if box is None else sha256_text(f"{content} {list(box)}"), box)


class ImageFolder:
    """Images of a benchmark below one folder; each file is read and hashed once.

    Args:
        setting: what the folder was given as, for messages.
    """

    def __init__(self, folder: Path, allow_missing: bool, setting: str) -> None:
        self.folder, self.allow_missing, self.setting = folder, allow_missing, setting
        self.missing: list[str] = []
        self._known: dict[tuple[str, Box | None], ImageItem | None] = {}

    def find(self, name: str, item: str, box: Box | None = None) -> ImageItem | None:
        """The image `name` of `item`; None, and counted, when it is not there and that is allowed.

        Raises:
            UserError: it is not there, cannot be read, or its name leads out of the folder.
        """
        if (name, box) not in self._known:
            self._known[name, box] = self._open(name, item, box)
        image = self._known[name, box]
        if image is None:
            self.missing.append(item)
        return image

    def _open(self, name: str, item: str, box: Box | None) -> ImageItem | None:
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{item}: expected the name of an image below {self.folder}, found '{name}'.")
        try:
            return image_item(path, box)
        except FileNotFoundError as error:
            if self.allow_missing:
                return None
            raise UserError(
                f"{path}: expected the image of {item}, but there is none. Check --{self.setting}, or give --allow_missing "
                "to score the items whose image is there."
            ) from error
        except OSError as error:
            raise UserError(f"{path}: expected the image of {item}, but it cannot be read: {error}") from error
