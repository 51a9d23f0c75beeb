"""From samples to micro-batches: in what order, which together, and padded how (packing is in `lmm.packing`).

In: samples of `lmm.data.ConversationDataset`, and their lengths from the check. Out: samplers whose order depends on
(seed, epoch) alone, and the tensors of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from lmm.conversation import IGNORED_LABEL
from lmm.rows import Rows
from lmm.settings import StageSettings

STEPS_PER_WINDOW = 50
"""Grouping sorts this many optimizer steps by length: more means less padding and less chance in what a step holds."""


@dataclass(frozen=True)
class Collator:
    """Pads a micro-batch on the right.

    Every micro-batch runs the vision path, because DeepSpeed aborts or hangs when a rank leaves parameters out: a text-only one
    gets a zero image whose tokens lie in the padding of its shortest sample. There attention and loss do not see them, so the
    projector's gradient from that batch is exactly zero.

    Args:
        image_shape: shape of what one image gives the model: `(3, height, width)`, or `(tokens, width)` of cached features.
    """

    pad_id: int
    image_token_id: int
    tokens_per_image: int
    image_shape: tuple[int, ...]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels`: int64 [batch, length]; `pixel_values`: float32 [images, *image_shape]."""
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
            pixels = [torch.zeros(1, *self.image_shape)]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": torch.cat(pixels)}


class EpochSampler(Sampler[int]):
    """A permutation that is a pure function of (seed, epoch); the epoch is set before each pass."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch])

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator().permutation(self.size).tolist())


class GroupedSampler(EpochSampler):
    """Batches of like samples: an optimizer step has samples of one modality and of similar length.

    The samples are permuted, parted into those with and those without images, and sorted by length within windows of
    STEPS_PER_WINDOW steps; the steps cut from them come in random order. What is left of each modality makes the end of the
    epoch, in which at most one micro-batch mixes them. Every sample comes once; with several
    processes, Trainer fills the last step up with samples of the start.

    Args:
        lengths: tokens per sample.
        images: images per sample.
        batch_size: samples per micro-batch.
        batches_per_step: micro-batches per optimizer step, over all processes.
    """

    def __init__(
        self, lengths: Sequence[int], images: Sequence[int], seed: int, batch_size: int, batches_per_step: int
    ) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.has_image = np.asarray(lengths), np.asarray(images) > 0
        self.step_size = batch_size * batches_per_step

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        order = generator.permutation(self.size)
        steps: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (order[self.has_image[order]], order[~self.has_image[order]]):
            whole = len(modality) - len(modality) % self.step_size
            for start in range(0, whole, self.step_size * STEPS_PER_WINDOW):
                window = modality[start : min(start + self.step_size * STEPS_PER_WINDOW, whole)]
                by_length = window[np.argsort(-self.lengths[window], kind="stable")]
                steps += np.split(by_length, len(window) // self.step_size)
            rest.append(modality[whole:][np.argsort(-self.lengths[modality[whole:]], kind="stable")])
        ordered = [steps[index] for index in generator.permutation(len(steps))] + rest
        return iter(np.concatenate(ordered).tolist())


class BalancedSampler(EpochSampler):
    """The order of another sampler, rearranged within each optimizer step so that its micro-batches have like token counts.

    A step is the sum over its micro-batches on all processes, so its loss and gradient stay the same; but no process waits for
    one that drew the long samples, and packed rows of all micro-batches fill alike.
    """

    def __init__(self, inner: EpochSampler, lengths: Sequence[int], batch_size: int, batches_per_step: int) -> None:
        super().__init__(len(lengths), inner.seed)
        self.inner, self.lengths, self.batch_size, self.batches_per_step = inner, lengths, batch_size, batches_per_step

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order, size = list(self.inner), self.batch_size * self.batches_per_step
        for start in range(0, len(order), size):
            step = order[start : start + size]
            if len(step) < size:  # the last one of an epoch: its micro-batches may be fewer
                yield from step
                continue
            for batch in self._balanced(step):
                yield from batch

    def _balanced(self, step: list[int]) -> list[list[int]]:
        """Longest first, each to the micro-batch with the fewest tokens that still has a place."""
        batches: list[list[int]] = [[] for _ in range(self.batches_per_step)]
        tokens = [0] * len(batches)
        for sample in sorted(step, key=lambda index: -self.lengths[index]):
            open_batches = [number for number, batch in enumerate(batches) if len(batch) < self.batch_size]
            chosen = min(open_batches, key=lambda number: tokens[number])
            batches[chosen].append(sample)
            tokens[chosen] += self.lengths[sample]
        return batches


def make_sampler(settings: StageSettings, rows: Rows, batches_per_step: int) -> EpochSampler:
    """The sampler of a stage; `batches_per_step` counts the micro-batches of an optimizer step over all processes."""
    lengths, images = rows.lengths.tolist(), rows.images.tolist()
    if settings.batching == "grouped":
        sampler: EpochSampler = GroupedSampler(lengths, images, settings.seed, settings.batch_size, batches_per_step)
    else:
        sampler = EpochSampler(len(rows), settings.seed)
    if settings.packing:
        sampler = BalancedSampler(sampler, lengths, settings.batch_size, batches_per_step)
    return sampler
