"""Image preprocessing: one specification, used by training, evaluation and export.

Decoded RGB arrays come in; uint8 crops, made in loader workers, and whole normalised batches go out (training), or the
processor that evaluation and exported folders use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
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


def evaluation_transform(processor: Any) -> Callable[[Image.Image], Tensor]:
    """What `processor` makes of one RGB image, float32 [3, S, S]: the same numbers, in two thirds of the time for CLIP's steps.

    Those are shorter side to S (by PIL), centre crop S, rescale, normalise; any other processor is called as it is. What is
    returned may be called from several threads.
    """
    side = processor.size.get("shortest_edge") if hasattr(processor.size, "get") else None
    steps = [getattr(processor, name, False) for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")]
    crop = processor.crop_size or {}
    if type(processor) is not CLIPImageProcessorPil or not all(steps) or not side == crop["height"] == crop["width"]:
        return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]
    # a pixel has 256 values: what the processor's arithmetic makes of each is looked up
    levels_LLC = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))
    levels = Image.fromarray(levels_LLC.copy())
    made = processor(images=levels, do_resize=False, do_center_crop=False, return_tensors="np")
    table_CL = made["pixel_values"][0][:, :, 0]

    def transform(image: Image.Image) -> Tensor:
        width, height = image.size
        short, long = min(image.size), max(image.size)
        target = (side, int(side * long / short)) if width <= height else (int(side * long / short), side)
        resized = image.resize(target, processor.resample)
        left, top = (target[0] - side) // 2, (target[1] - side) // 2
        pixels_SSC = np.asarray(resized.crop((left, top, left + side, top + side)))
        out_CSS = np.empty((3, side, side), np.float32)
        for channel in range(3):
            np.take(table_CL[channel], pixels_SSC[:, :, channel], out=out_CSS[channel], mode="clip")
        return torch.from_numpy(out_CSS)

    return transform


def crop_box(width: int, height: int, scale: tuple[float, float], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels: random area (`scale`, a share of the image's) and ratio (3/4 to 4/3)."""
    for _ in range(10):
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        target = width * height * generator.uniform(*scale)
        crop_width, crop_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(0, width - crop_width + 1))
            top = int(generator.integers(0, height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    side = min(width, height)  # no such crop fits: the largest centred square
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_resized_crop(image_HW3: np.ndarray, size: int, scale: tuple[float, float], generator: np.random.Generator) -> Tensor:
    """uint8 [size, size, 3]: a random crop, resized by antialiased bicubic (official LIFT training).

    torch's uint8 kernel is 4 to 6 times faster than PIL and within 0.03 grey levels of it on average. It works channels-last,
    and to stay so as far as the model saves two transpositions.
    """
    left, top, right, bottom = crop_box(image_HW3.shape[1], image_HW3.shape[0], scale, generator)
    crop_13HW = torch.from_numpy(image_HW3[top:bottom, left:right])[None].permute(0, 3, 1, 2)
    resized_13SS = interpolate(crop_13HW, (size, size), mode="bicubic", antialias=True)
    return resized_13SS[0].permute(1, 2, 0).contiguous()


def normalise(pixels_B3HW: Tensor) -> Tensor:
    """uint8 0-255 to float32 with OpenAI CLIP mean and deviation, on the tensor's device and in its memory format."""
    device = pixels_B3HW.device
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=device).view(3, 1, 1) * 255
    deviation = torch.tensor(OPENAI_CLIP_STD, device=device).view(3, 1, 1) * 255
    if device.type != "cpu":
        return torch.sub(pixels_B3HW, mean).div_(deviation)
    # whole planes of constants, in the order of the pixels, let the passes run over long rows
    mean, deviation = (torch.empty_like(pixels_B3HW[0], dtype=torch.float32).copy_(value) for value in (mean, deviation))
    # NumPy asks the system for huge pages, which torch does not; small ones cost more than the arithmetic
    normalised = torch.from_numpy(np.empty_like(pixels_B3HW.numpy(), dtype=np.float32))
    for source_3HW, target_3HW in zip(pixels_B3HW, normalised, strict=True):  # image by image all passes stay in the cache
        target_3HW.copy_(source_3HW).sub_(mean).div_(deviation)
    return normalised
