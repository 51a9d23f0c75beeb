"""Images of one colour in classes named by colours, and an encoder that may take every text for the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import encoded
from toy_encoder import COLOURS, ToyEncoder

__all__ = ["COLOURS", "ColourEncoder", "colour_image", "write_images"]


def colour_image(colour: tuple[int, int, int], width: int = 8) -> bytes:
    """A PNG of one colour. Another width is another file of the same colour."""
    return encoded(Image.new("RGB", (width, 8), colour))


def write_images(folder: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class ColourEncoder(ToyEncoder):
    """A text without a colour word is (1, 1, 1), and so is every text when `collapsed`."""

    def __init__(self, has_frozen_text: bool = False, collapsed: bool = False) -> None:
        super().__init__("collapsed" if collapsed else "colours", has_frozen_text)
        self.collapsed = collapsed

    def text_embeddings(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        found_N3 = super().text_embeddings(texts)
        found_N3[(found_N3 == 0).all(axis=1) | self.collapsed] = 1
        return found_N3
