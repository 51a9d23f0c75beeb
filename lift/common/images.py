"""Decoding of images that come from outside: one place that knows what PIL raises on damaged or hostile files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageFile


class ImageFault(ValueError):
    """The bytes are not a whole image that can be decoded; the message says what PIL found."""


def decode_image(source: Path | bytes) -> Image.Image:
    """RGB image, decoded to its end. Raises ImageFault when it cannot be, FileNotFoundError when there is no such file."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # libraries switch it on for everyone (lmms-eval does); half an image is a fault
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageFault(f"{type(error).__name__}: {error}") from error
