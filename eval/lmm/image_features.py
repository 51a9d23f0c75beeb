"""Projected features of images, computed once for the rows that share an image (circular copies, POPE's questions).

In: images with their content hashes. Out: what the language model reads in place of the image tokens. The store is bounded, and
what was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

MAX_BYTES = 512 * 2**20
"""A hundred images of LLaVA-1.5 7B in bfloat16 (576 tokens of 4,096 numbers)."""


class ImageFeatures:
    """Features by content hash.

    Args:
        model: LlavaForConditionalGeneration; its own `get_image_features` is the vision tower and the projector.
        image_processor: makes `pixel_values` [images, 3, height, width] of PIL images.
        max_bytes: upper bound of what is kept between calls, on the model's device.
    """

    def __init__(self, model: Any, image_processor: Any, max_bytes: int = MAX_BYTES) -> None:
        self.model, self.image_processor, self.max_bytes = model, image_processor, max_bytes
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def of(self, images: Sequence[tuple[str, Image.Image]]) -> list[torch.Tensor]:
        """Features [tokens, width] of each image, in order; those that are not kept are computed in one batch."""
        missing = {sha256: image for sha256, image in images if sha256 not in self._kept}
        if missing:
            pixels = self.image_processor(list(missing.values()), return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.model.device, self.model.dtype)
            config = self.model.config
            outputs = self.model.get_image_features(
                pixel_values=pixels,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            )
            for sha256, features in zip(missing, outputs.pooler_output, strict=True):
                self._kept[sha256] = features.clone()  # of its own: a view would keep the whole batch
                self._bytes += features.nbytes
        for sha256, _ in images:
            self._kept.move_to_end(sha256)
        features_of_all = [self._kept[sha256] for sha256, _ in images]
        while self._bytes > self.max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return features_of_all
