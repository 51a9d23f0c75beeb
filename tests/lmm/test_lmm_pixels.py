"""Preprocessing of images: bit for bit that of the original LLaVA, and the same after a model is saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from lmm.images import load_image
from lmm.processor import set_aspect_ratio

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
needs_fixture = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"pixels of the original LLaVA are not at {FIXTURES}")
ONE_GREY_LEVEL = 1 / 255 / min(CLIPImageProcessorPil().image_std)


class Holder:
    """What set_aspect_ratio asks of a processor."""

    def __init__(self, folder: Path) -> None:
        self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(folder)


def pixels(processor: Any, image: Image.Image) -> np.ndarray:
    return processor(image, return_tensors="pt")["pixel_values"].numpy()


@needs_fixture
@pytest.mark.parametrize(
    ("processor", "image", "reference"),
    [
        ("llava_masks/processor", "llava_masks/images/a.png", "llava_masks/pixel_values_a_pad.npy"),
        ("llava_ckpt/clip_tower", "llava_ckpt/images/wide.png", "llava_ckpt/wide_pad.npz"),
        ("llava_ckpt/clip_tower", "llava_ckpt/images/tall.png", "llava_ckpt/tall_pad.npz"),
    ],
)
def test_padded_pixels_are_those_of_the_original_llava(processor: str, image: str, reference: str, tmp_path: Path) -> None:
    holder = Holder(FIXTURES / processor)
    set_aspect_ratio(holder, "pad")
    file = np.load(FIXTURES / reference)
    expected = file if isinstance(file, np.ndarray) else file["pixel_values"]
    picture = load_image(FIXTURES / image)
    found = pixels(holder.image_processor, picture)
    assert np.array_equal(found, expected.reshape(found.shape))
    holder.image_processor.save_pretrained(tmp_path)
    assert np.array_equal(pixels(AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), picture), found)
    # what transformers prefers when it loads the folder is not the same, but near
    assert np.abs(pixels(AutoImageProcessor.from_pretrained(tmp_path), picture) - found).max() < 1.01 * ONE_GREY_LEVEL


@needs_fixture
def test_cropped_pixels_differ_from_padded_ones() -> None:
    holder = Holder(FIXTURES / "llava_ckpt" / "clip_tower")
    picture = load_image(FIXTURES / "llava_ckpt" / "images" / "wide.png")
    expected = pixels(holder.image_processor, picture)
    set_aspect_ratio(holder, "crop")
    assert np.array_equal(pixels(holder.image_processor, picture), expected)
    assert not np.array_equal(np.load(FIXTURES / "llava_ckpt" / "wide_pad.npz")["pixel_values"], expected)


def test_each_way_to_a_square_is_what_it_says_whatever_came_before(tower: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    plain = CLIPImageProcessorPil.from_pretrained(tower)
    square = Image.new("RGB", (64, 64), tuple(int(255 * mean) for mean in plain.image_mean))
    square.paste(picture, (0, 12))
    expected = {
        "pad": pixels(plain, square),
        "crop": pixels(plain, picture),
        "resize": pixels(plain, picture.resize((32, 32), Image.Resampling.BICUBIC)),
    }
    holder = Holder(tower)
    for ratio in ("pad", "resize", "crop", "resize", "pad", "crop"):
        set_aspect_ratio(holder, ratio)
        assert np.array_equal(pixels(holder.image_processor, picture), expected[ratio]), ratio
    assert torch.from_numpy(expected["resize"]).shape == (1, 3, 32, 32)
    assert json.loads(holder.image_processor.to_json_string())["size"] == {"shortest_edge": 32}
