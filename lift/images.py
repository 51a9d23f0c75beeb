"""Image preprocessing: one specification, used by training, evaluation and export.

Bytes of an image come in; uint8 crops (training) or normalised float batches (evaluation) go out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_processor(image_size: int) -> CLIPImageProcessorPil:
    """Evaluation preprocessing: shorter side to `image_size` (bicubic), centre crop, OpenAI CLIP mean and deviation.

    The PIL backend is pixel-identical to what CLIP was trained with; torchvision's differs by a grey level.
    """
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(OPENAI_CLIP_MEAN),
        image_std=list(OPENAI_CLIP_STD),
    )


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """uint8 [3, size, size]: a crop of random area (`scale`) and ratio (3/4 to 4/3), bicubic (official LIFT training)."""
    area = image.width * image.height
    box: tuple[float, float, float, float] | None = None
    for _ in range(10):
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        target = area * generator.uniform(*scale)
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(generator.integers(0, image.width - width + 1))
            top = int(generator.integers(0, image.height - height + 1))
            box = (left, top, left + width, top + height)
            break
    if box is None:  # no such crop fits: the largest centred square
        side = min(image.width, image.height)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized).transpose(2, 0, 1)


def normalise(pixels_B3HW: Tensor) -> Tensor:
    """uint8 0-255 to float32 with OpenAI CLIP mean and deviation, on the tensor's device."""
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=pixels_B3HW.device).view(3, 1, 1) * 255
    std = torch.tensor(OPENAI_CLIP_STD, device=pixels_B3HW.device).view(3, 1, 1) * 255
    return (pixels_B3HW.float() - mean) / std
