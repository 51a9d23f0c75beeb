"""An encoder whose features can be worked out by hand: an image is its mean colour, a text the sum of its colour words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import encoded
from torch import Tensor

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def colour_image(colour: tuple[int, int, int], width: int = 8) -> bytes:
    """A PNG of one colour. Another width is another file of the same colour."""
    return encoded(Image.new("RGB", (width, 8), colour))


def write_images(folder: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class ColourEncoder:
    """Embeds in three dimensions: red, green, blue. A text without a colour word is (1, 1, 1)."""

    name, content_hash, text_hash = "colours", "c0" * 32, "7e" * 32
    is_clip, embedding_dim = True, 3

    def __init__(self, has_frozen_text: bool = False, collapsed: bool = False) -> None:
        self.has_frozen_text, self.collapsed = has_frozen_text, collapsed
        self.texts: list[str] = []

    def pixel_values(self, image: Image.Image, protocol: str) -> Tensor:
        return torch.from_numpy(np.array(image.resize((8, 8)), np.float32).transpose(2, 0, 1) / 255)

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def text_embeddings(self, texts: list[str]) -> np.ndarray:
        self.texts += texts
        return np.stack([self._text(text) for text in texts])

    def _text(self, text: str) -> np.ndarray:
        words = [] if self.collapsed else text.replace(".", "").split()
        found = [np.array(COLOURS[word], np.float32) / 255 for word in words if word in COLOURS]
        return np.sum(found, axis=0, dtype=np.float32) if found else np.ones(3, np.float32)

    def align(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings
