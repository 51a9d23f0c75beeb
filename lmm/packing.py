"""Packing: several samples in one row, with attention that does not cross from one to the next.

In: the samples of one micro-batch. Out: its tensors with fewer, fuller rows. A micro-batch holds the same samples as without
packing, so that its loss and gradient are the same up to rounding; only the padding is gone. Where a sample begins is told by
`position_ids` that restart, without `attention_mask` or cache. From them transformers builds the block-diagonal mask of eager,
SDPA and FlexAttention (also within sliding windows), and the sequence lengths of flash-attention. SDPA of models with full
attention is run sample by sample instead (`packed_sdpa`): it and flash-attention take the whole micro-batch as one row without
padding. Whether a language model follows is not taken from its name but tried: `refuse_leaks`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, LlavaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lift.common.errors import UserError
from lmm.batches import Collator
from lmm.conversation import IGNORED_LABEL
from lmm.settings import StageSettings

PACKED_SDPA = "packed_sdpa"


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Divides samples among rows of at most `max_length` tokens so that rows times the longest row is smallest.

    First-fit-decreasing tells how few rows will do. From there on each number of rows is tried with the samples dealt out
    evenly, longest first, each to the emptiest row: a row more is often shorter by more than what it adds.

    Returns:
        Per row the indices of its samples in rising order. A sample longer than `max_length` has a row of its own.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = []
    filled: list[int] = []
    for index in by_length:
        fits = (row for row in range(len(rows)) if filled[row] + lengths[index] <= max_length)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row].append(index)
        filled[row] += lengths[index]
    best, limit = (len(rows) * max(filled), rows), max(max_length, max(lengths))
    for count in range(len(rows), len(lengths) + 1):
        if count * max(lengths) >= best[0]:
            break
        even: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, row) for row in range(count)]
        for index in by_length:
            tokens, row = emptiest[0]
            even[row].append(index)
            heapq.heapreplace(emptiest, (tokens + lengths[index], row))
        width = max(emptiest)[0]
        if width <= limit and count * width < best[0]:
            best = count * width, even
    return [sorted(row) for row in best[1]]


def packed_sdpa(
    module: torch.nn.Module,
    query_1HLD: torch.Tensor,
    key_1HLD: torch.Tensor,
    value_1HLD: torch.Tensor,
    attention_mask: None,
    position_ids: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Causal SDPA sample by sample within one row: no mask, and none of the work that a mask would discard.

    An attention implementation of transformers, under the name PACKED_SDPA. `position_ids`, int64 [1, length], restart at each
    sample; the result is [1, length, heads, head dimension].

    Raises:
        UserError: the model does not hand `position_ids` to its attention.
    """
    if position_ids is None or position_ids.shape != (1, query_1HLD.shape[2]):
        raise UserError("packing: this language model does not tell its attention where samples begin. Train without packing.")
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = [stop - start for start, stop in pairwise([*starts, query_1HLD.shape[2]])]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query_1HLD, key_1HLD, value_1HLD))
    parts = [
        sdpa_attention_forward(module, query, key, value, None, **keywords)[0]
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)


@dataclass(frozen=True)
class PackingCollator(Collator):
    """Packs a micro-batch into rows of at most `max_length` tokens, padded on the right to the longest.

    Args:
        max_length: longest row in tokens; only the zero image of a text-only micro-batch may exceed it.
        one_row: joins all rows to one without padding, the form in which flash-attention finds the samples' bounds.
    """

    max_length: int = 2048
    one_row: bool = False

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids`: int64 [rows, length]; `pixel_values` as Collator; `use_cache` False."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        rows = [list(range(len(samples)))] if self.one_row else pack(lengths, self.max_length)
        parts = [[self._part(samples[index]) for index in row] for row in rows]
        pixels = [samples[index]["pixel_values"] for row in rows for index in row if samples[index]["pixel_values"] is not None]
        if not pixels:
            pixels = [torch.zeros(1, *self.image_shape)]
            shortest = min(parts, key=lambda row: sum(part.shape[1] for part in row))
            shortest.append(self._ignored(self.tokens_per_image, self.image_token_id))
        width = max(sum(part.shape[1] for part in row) for row in parts)
        for row in parts:
            missing = width - sum(part.shape[1] for part in row)
            if missing:
                row.append(self._ignored(missing, self.pad_id))
        input_ids, labels, position_ids = torch.stack([torch.cat(row, dim=1) for row in parts]).unbind(1)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "pixel_values": torch.cat(pixels),
            "use_cache": False,  # with a cache, transformers would not look for packed samples
        }

    @staticmethod
    def _part(sample: dict[str, Any]) -> torch.Tensor:
        """Ids, labels and positions of one sample: [3, length]. Nothing stands before its first token that could predict it."""
        labels = [IGNORED_LABEL, *sample["labels"][1:]]
        return torch.tensor([sample["input_ids"], labels, list(range(len(labels)))])

    @staticmethod
    def _ignored(length: int, token_id: int) -> torch.Tensor:
        """A part that no sample attends to, and that counts in no loss."""
        return torch.stack([torch.full((length,), token_id), torch.full((length,), IGNORED_LABEL), torch.arange(length)])


def make_collator(settings: StageSettings, llava: LlavaConfig, model: Any, pad_id: int) -> Collator:
    """The collator of a stage: padding or packing, of pixels or of cached features."""
    vision: Any = llava.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    pixels = (vision.num_channels, vision.image_size, vision.image_size)
    image_shape = (tokens, vision.hidden_size) if settings.cache_features else pixels
    if not settings.packing:
        return Collator(pad_id, llava.image_token_id, tokens, image_shape)
    one_row = use_packed_attention(model)
    return PackingCollator(pad_id, llava.image_token_id, tokens, image_shape, settings.max_length, one_row)


def use_packed_attention(model: Any) -> bool:
    """Sets a LLaVA model's language model to PACKED_SDPA where that does what its SDPA does: with full attention in all layers.

    Returns:
        Whether all samples of a micro-batch belong in one row: with PACKED_SDPA and flash-attention.
    """
    config = model.get_decoder().config
    full = set(getattr(config, "layer_types", None) or []) <= {"full_attention"}
    windowed = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if config._attn_implementation == "sdpa" and full and not windowed:
        config._attn_implementation = PACKED_SDPA
    return config._attn_implementation == PACKED_SDPA or "flash" in config._attn_implementation


def attention_of(model: Any) -> str:
    """Name of the language model's attention implementation."""
    return str(model.get_decoder().config._attn_implementation)


@torch.no_grad()
def refuse_leaks(logits_of: Callable[..., torch.Tensor], vocabulary: int, device: torch.device, attention: str) -> None:
    """Runs two short texts packed and each alone, and compares.

    Args:
        logits_of: forward pass in evaluation mode: `input_ids` and `position_ids` int64 [1, length] to logits [1, length, ids].
        vocabulary: ids below it are drawn for the texts.
        attention: name of the attention implementation, for the message.
    Raises:
        UserError: a text's logits depend on the other one in its row, or on where in the row it stands.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocabulary, (1, length), generator=generator) for length in (9, 9, 7))

    def run(*texts: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
        return logits_of(input_ids=torch.cat(texts, dim=1).to(device), position_ids=positions.to(device), use_cache=False)

    packed, swapped = run(first, second), run(other, second)
    alone = torch.cat([run(first), run(second)], dim=1)
    scale = float(alone.abs().max())
    # Between rows of one shape there is only what leaks; between different shapes there is also rounding.
    leaked = float((packed - swapped)[:, first.shape[1] :].abs().max()) / scale
    moved = float((packed - alone).abs().max()) / scale
    if leaked > 1e-5 or moved > (1e-3 if alone.dtype == torch.float32 else 0.1):
        raise UserError(
            f"packing: this language model with attention '{attention}' lets packed samples see each other (logits differ by "
            f"{max(leaked, moved):.1%}): it does not take samples' bounds from position_ids. Train without --packing."
        )
