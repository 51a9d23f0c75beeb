"""From samples to micro-batches: in what order, which together, and padded how.

In: samples of `lmm.data.ConversationDataset`. Out: samplers whose order depends on (seed, epoch) alone, and the tensors of
one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from lmm.conversation import IGNORED_LABEL


@dataclass(frozen=True)
class Collator:
    """Pads a micro-batch on the right.

    Every micro-batch runs the vision path, because DeepSpeed aborts or hangs when a rank leaves parameters out: a text-only one
    gets a zero image whose tokens lie in the padding of its shortest sample. There attention and loss do not see them, so the
    projector's gradient from that batch is exactly zero.
    """

    pad_id: int
    image_token_id: int
    tokens_per_image: int
    image_size: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels`: int64 [batch, length]; `pixel_values`: float32 [images, 3, H, W]."""
        pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        lengths = [len(sample["input_ids"]) for sample in samples]
        placeholder = 0 if pixels else self.tokens_per_image
        width = max(max(lengths), min(lengths) + placeholder)
        input_ids = torch.full((len(samples), width), self.pad_id)
        labels = torch.full((len(samples), width), IGNORED_LABEL)
        for row, sample in enumerate(samples):
            input_ids[row, : lengths[row]] = torch.tensor(sample["input_ids"])
            labels[row, : lengths[row]] = torch.tensor(sample["labels"])
        attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        if placeholder:
            shortest = int(np.argmin(lengths))
            input_ids[shortest, lengths[shortest] : lengths[shortest] + placeholder] = self.image_token_id
            pixels = [torch.zeros(1, 3, self.image_size, self.image_size)]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": torch.cat(pixels)}


class EpochSampler(Sampler[int]):
    """A permutation that is a pure function of (seed, epoch); the epoch is set before each pass."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())
