"""An image-text encoder whose features can be worked out by hand: mean colours, and the colour words of a sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lift.common.files import sha256_text

WORDS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ToyEncoder:
    """D = 3. `seen` counts how often each text and how many images went through."""

    embedding_dim = 3
    is_clip = True
    device = torch.device("cpu")

    def __init__(self, name: str = "toy", frozen_text: bool = False, scale: float = 1.0) -> None:
        self.name, self.has_frozen_text, self.scale = name, frozen_text, scale
        self.content_hash, self.text_hash = sha256_text(f"images {name}"), sha256_text(f"texts {name} {scale}")
        self.seen: Counter[str] = Counter()

    def pixel_values(self, image: Image.Image, protocol: str = "standard") -> Tensor:
        assert image.mode == "RGB"
        return torch.from_numpy(np.asarray(image).mean((0, 1)).astype(np.float32) / 255).view(3, 1, 1)

    def image_embeddings(self, pixel_values_B3HW: Tensor) -> Tensor:
        self.seen["images"] += len(pixel_values_B3HW)
        return pixel_values_B3HW.flatten(1)

    def text_embeddings(self, texts: list[str], batch_size: int = 256) -> np.ndarray:
        self.seen.update(texts)
        vectors = [[WORDS[word] for word in text.lower().split() if word in WORDS] or [(0.1, 0.1, 0.1)] for text in texts]
        return np.array([self.scale * np.sum(words, axis=0) for words in vectors], np.float32)

    def align(self, text_NT: np.ndarray) -> np.ndarray:
        return text_NT


def colour_image(path: Path, *colours: str, mode: str = "RGB") -> Path:
    """A PNG with one column for each colour, from left to right."""
    pixels = np.array([[[int(255 * value) for value in WORDS[colour]] for colour in colours]], np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((len(colours) * 4, 4), Image.Resampling.NEAREST).convert(mode).save(path)
    return path
