"""An encoder whose features are known by hand: an image is its mean colour, a text is how often it says red, green and blue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lift.common.files import sha256_text

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ToyEncoder:
    """D = 3. `seen` counts how often each text, and how many images, went through; texts are `scale` times too long."""

    is_clip, embedding_dim, device = True, 3, torch.device("cpu")

    def __init__(self, name: str = "toy", has_frozen_text: bool = False, scale: float = 1.0) -> None:
        self.name, self.has_frozen_text, self.scale = name, has_frozen_text, scale
        self.content_hash, self.text_hash = sha256_text(f"images {name}"), sha256_text(f"texts {name} {scale}")
        self.seen: Counter[str] = Counter()

    def pixel_values(self, image: Image.Image, protocol: str = "standard") -> Tensor:
        mean_C = np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) / 255
        return torch.from_numpy(mean_C)[:, None, None]

    def image_embeddings(self, pixel_values_B3HW: Tensor) -> Tensor:
        self.seen["images"] += len(pixel_values_B3HW)
        return pixel_values_B3HW.mean(dim=(2, 3))

    def text_embeddings(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        self.seen.update(texts)
        words = [text.replace(".", "").split() for text in texts]
        return self.scale * np.array([[found.count(colour) for colour in COLOURS] for found in words], np.float32)

    def align(self, text_NT: np.ndarray) -> np.ndarray:
        return text_NT


def solid(path: Path, colour: str | tuple[int, int, int], mode: str = "RGB") -> Path:
    """A PNG of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = COLOURS[colour] if isinstance(colour, str) else colour
    Image.new("RGB", (8, 6), rgb).convert(mode).save(path)
    return path
