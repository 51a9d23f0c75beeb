"""An encoder whose features are known by hand: an image is its mean colour, a text is how often it says red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ToyEncoder:
    name, content_hash, text_hash = "toy", "toy-images", "toy-texts"
    is_clip, embedding_dim = True, 3

    def __init__(self, has_frozen_text: bool = False) -> None:
        self.has_frozen_text = has_frozen_text

    def pixel_values(self, image: Image.Image, protocol: str) -> Tensor:
        mean_C = np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) / 255
        return torch.from_numpy(mean_C)[:, None, None]

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def text_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.split().count(colour) for colour in COLOURS] for text in texts], np.float32)

    def align(self, texts_NT: np.ndarray) -> np.ndarray:
        return texts_NT


def solid(path: Path, colour: str | tuple[int, int, int], mode: str = "RGB") -> None:
    """A PNG of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = COLOURS[colour] if isinstance(colour, str) else colour
    Image.new("RGB", (8, 6), rgb).convert(mode).save(path)
