"""Training batches: samples and their text side in, batches of this process's share of the global order out.

The crop and the choice of caption are seeded by (seed, epoch, item), so a batch is the same whoever loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lift.common.images import ImageFault, decode_rgb, image_fault
from lift.common.preemption import outlive_preemption
from lift.images import random_resized_crop
from lift.order import batch_positions
from lift.settings import PretrainSettings
from lift.sources import Samples
from lift.sources.samples import read_images


class TextSide(Protocol):
    """The text side of batches. Captions are numbered over all samples in their order."""

    def __call__(self, step: int, caption_numbers: np.ndarray, keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        """The tensors of a batch of `step`; what stands for an unusable caption is arbitrary."""
        ...

    def is_usable(self, caption_numbers: np.ndarray) -> np.ndarray:
        """bool, one for each."""
        ...


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


class Pairs:
    """What an epoch goes through: every image once with one of its captions, or every caption once with its image."""

    def __init__(self, samples: Samples, settings: PretrainSettings) -> None:
        self.samples, self.captions, self.seed = samples, settings.captions, settings.seed
        counts = np.concatenate([shard.caption_counts() for shard in samples.shards])
        self.caption_starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.caption_starts[-1]) if self.captions == "all" else len(self.samples)

    def sample_of(self, item: int) -> int:
        """Number of the sample that an item of an epoch shows."""
        return int(np.searchsorted(self.caption_starts, item, side="right")) - 1 if self.captions == "all" else item

    def caption_of(self, epoch: int, item: int) -> int:
        """Number of the caption that goes with it."""
        if self.captions == "all":
            return item
        first, stop = (int(start) for start in self.caption_starts[item : item + 2])
        if self.captions == "first":
            return first
        return first + int(np.random.default_rng([self.seed, epoch, item, 1]).integers(stop - first))


class PairDataset(Dataset):
    """Batches of (step, epoch, item): the crop of the image and the caption that this epoch uses."""

    def __init__(self, pairs: Pairs, settings: PretrainSettings) -> None:
        self.pairs, self.settings = pairs, settings

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, places: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
        """All items of a batch at once, so that remote images are asked for together."""
        samples = [self.pairs.samples[self.pairs.sample_of(item)] for _, _, item in places]
        contents = read_images([sample.image for sample in samples])
        return [self._item(*row) for row in zip(places, samples, contents, strict=True)]

    def _item(self, place: tuple[int, int, int], sample: Any, content: bytes | OSError) -> dict[str, Any]:
        step, epoch, number = place
        size = self.settings.vision.image_size
        caption = self.pairs.caption_of(epoch, number)
        texts = list(sample.captions.values())
        text = texts[caption - int(self.pairs.caption_starts[self.pairs.sample_of(number)])]
        item: dict[str, Any] = {"step": step, "key": sample.key, "caption_number": caption, "caption": text, "fault": None}
        try:
            if isinstance(content, OSError):
                raise content
            image_HW3 = decode_rgb(content)
        except (OSError, ImageFault) as error:
            return item | {"pixels": torch.zeros(size, size, 3, dtype=torch.uint8), "fault": image_fault(error)}
        crop = np.random.default_rng([self.settings.seed, epoch, number, 2])
        return item | {"pixels": random_resized_crop(image_HW3, size, self.settings.crop_scale, crop)}


class StepSampler(Sampler[list[tuple[int, int, int]]]):
    """(step, epoch, item): this process's share of each global batch of `steps`."""

    def __init__(self, settings: PretrainSettings, items: int, steps: range, rank: int, world: int) -> None:
        self.settings, self.items, self.steps, self.rank, self.world = settings, items, steps, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        share = self.settings.batch_size // self.world
        for step in self.steps:
            places = batch_positions(self.settings.seed, step, self.settings.batch_size, self.items)
            yield [(step, *place) for place in places[self.rank * share : (self.rank + 1) * share]]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Collate:
    """Items of a batch to the batch; an object, so that it can be sent to processes that are not forked."""

    text_side: TextSide

    def __call__(self, items: list[dict[str, Any]]) -> Batch:
        numbers, keys = np.array([item["caption_number"] for item in items]), [item["key"] for item in items]
        readable = np.array([item["fault"] is None for item in items])
        return Batch(
            # default_collate stacks straight into memory shared with the main process
            pixels_B3HW=default_collate([item["pixels"] for item in items]).permute(0, 3, 1, 2),
            text=self.text_side(items[0]["step"], numbers, keys, [item["caption"] for item in items]),
            valid_B=torch.from_numpy(readable & self.text_side.is_usable(numbers)),
            keys=keys,
            faults=[(item["key"], *item["fault"]) for item in items if item["fault"]],
        )


def make_loader(
    pairs: Pairs, settings: PretrainSettings, text_side: TextSide, steps: range, rank: int, world: int
) -> DataLoader:
    """Loader over the batches of `steps`, in order."""
    return DataLoader(
        PairDataset(pairs, settings),
        batch_sampler=StepSampler(settings, len(pairs), steps, rank, world),
        num_workers=settings.workers,
        worker_init_fn=outlive_preemption,
        collate_fn=Collate(text_side),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if settings.workers else None,
    )
