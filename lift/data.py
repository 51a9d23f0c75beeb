"""Training batches: samples and their text side in, batches of this process's share of the global order out.

The crop and the choice of caption are seeded by (seed, epoch, sample), so a batch is the same whoever loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lift.common.images import ImageFault, decode_rgb
from lift.images import random_resized_crop
from lift.order import batch_positions
from lift.settings import PretrainSettings
from lift.sources import Sample


class TextSide(Protocol):
    """The text side of batches."""

    def __call__(self, caption_keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        """The tensors of a batch; what stands for an unusable caption is arbitrary."""
        ...

    def is_usable(self, caption_key: str) -> bool: ...


@dataclass
class Batch:
    pixels_B3HW: Tensor
    """uint8, channels-last in memory."""
    text: dict[str, Tensor]
    valid_B: Tensor
    """False where a sample could not be read and zeros stand in for it."""
    keys: list[str]
    faults: list[tuple[str, str, str]]
    """(key, cause, detail) for the drop ledger."""

    def pin_memory(self) -> Batch:
        text = {name: tensor.pin_memory() for name, tensor in self.text.items()}
        return Batch(self.pixels_B3HW.pin_memory(), text, self.valid_B.pin_memory(), self.keys, self.faults)


class PairDataset(Dataset):
    """Item (epoch, index): the crop of the image and the caption that this epoch uses."""

    def __init__(self, samples: list[Sample], settings: PretrainSettings) -> None:
        self.samples = samples
        self.settings = settings

    def __len__(self) -> int:
        return len(self.samples)

    def caption_of(self, epoch: int, index: int) -> tuple[str, str]:
        """(caption key, caption)."""
        captions = list(self.samples[index].captions.items())
        if self.settings.captions == "first":
            return captions[0]
        return captions[int(np.random.default_rng([self.settings.seed, epoch, index, 1]).integers(len(captions)))]

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        sample, size = self.samples[index], self.settings.vision.image_size
        caption_key, caption = self.caption_of(epoch, index)
        item = {"key": sample.key, "caption_key": caption_key, "caption": caption, "fault": None}
        try:
            image_HW3 = decode_rgb(sample.image.read())
        except (OSError, ImageFault) as error:
            return item | {"pixels": torch.zeros(size, size, 3, dtype=torch.uint8), "fault": f"{type(error).__name__}: {error}"}
        crop = np.random.default_rng([self.settings.seed, epoch, index, 2])
        return item | {"pixels": random_resized_crop(image_HW3, size, self.settings.crop_scale, crop)}


class StepSampler(Sampler[list[tuple[int, int]]]):
    """This process's share of each global batch, from `first_step` to `last_step`."""

    def __init__(self, settings: PretrainSettings, samples: int, steps: range, rank: int, world: int) -> None:
        self.settings, self.samples, self.steps, self.rank, self.world = settings, samples, steps, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.settings.batch_size // self.world
        for step in self.steps:
            places = batch_positions(self.settings.seed, step, self.settings.batch_size, self.samples)
            yield places[self.rank * share : (self.rank + 1) * share]

    def __len__(self) -> int:
        return len(self.steps)


def make_loader(
    samples: list[Sample], settings: PretrainSettings, text_side: TextSide, steps: range, rank: int, world: int
) -> DataLoader:
    """Loader over the batches of `steps`, in order."""

    def collate(items: list[dict[str, Any]]) -> Batch:
        return Batch(
            # default_collate stacks straight into memory shared with the main process
            pixels_B3HW=default_collate([item["pixels"] for item in items]).permute(0, 3, 1, 2),
            text=text_side([item["caption_key"] for item in items], [item["caption"] for item in items]),
            valid_B=torch.tensor([item["fault"] is None and text_side.is_usable(item["caption_key"]) for item in items]),
            keys=[item["key"] for item in items],
            faults=[(item["key"], "undecodable image", item["fault"]) for item in items if item["fault"]],
        )

    return DataLoader(
        PairDataset(samples, settings),
        batch_sampler=StepSampler(settings, len(samples), steps, rank, world),
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if settings.workers else None,
    )
