"""What every frozen text encoder shares: captions in, float32 embeddings out, in the order given.

Captions are tokenised once, sorted by their number of tokens and cut into batches under a budget of padded tokens, so that
hardly any padding is computed and every batch is about as much work. Which captions share a batch depends only on the set of
captions given, never on their order, so the same call gives the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lift.settings import TextEncoderSettings

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Padded tokens in one forward pass by device; the CPU's was the fastest in `benchmarks/embedding.py`."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Tokenised:
    """Captions as the model takes them, in the order given; the three lists are of one length."""

    rows: list[Any]
    """What `TextEncoder.forward` takes for one caption."""
    lengths: list[int]
    """Tokens of each row, at most max_length."""
    truncated: list[bool]
    """Whether the caption had more tokens than max_length."""


@dataclass(frozen=True)
class Encoded:
    embeddings: np.ndarray
    """float32 [captions, dimension], in the order given; NaN where a caption has no token to pool."""
    truncated: int
    """Captions given (repetitions count) that had more tokens than max_length."""


class TextEncoder(ABC):
    """A frozen text encoder. Subclasses say how captions become tokens, and a batch of those embeddings."""

    dimension: int
    """Of an embedding."""

    def __init__(self, settings: TextEncoderSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.dtype = DTYPES[resolve_precision(settings.precision)]

    @abstractmethod
    def tokenise(self, captions: list[str]) -> Tokenised:
        """The prompt is put before every caption here."""

    @abstractmethod
    def forward(self, rows: list[Any]) -> Tensor:
        """float32 [len(rows), dimension], not normalised unless the model itself normalises."""

    def encode(self, captions: list[str], progress: str | None = None) -> np.ndarray:
        """float32 [len(captions), dimension], in the order given; `progress` names a progress bar."""
        return self.encode_counted(captions, progress).embeddings

    @torch.inference_mode()
    def encode_counted(
        self, captions: list[str], progress: str | None = None, known: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> Encoded:
        """Embeds each distinct caption once, longest first, and counts captions over max_length in the same tokenisation.

        `known` holds embeddings, float32 [dimension], of captions that were embedded before.
        """
        distinct = sorted(set(captions))
        tokens = self.tokenise(distinct) if distinct else Tokenised([], [], [])
        embeddings = np.full((len(distinct), self.dimension), np.nan, np.float32)
        for index, caption in enumerate(distinct):
            embeddings[index] = known.get(caption, np.nan)
        unknown = [index for index, caption in enumerate(distinct) if caption not in known]
        order = sorted(unknown, key=lambda index: -tokens.lengths[index])
        budget = self.settings.batch_tokens or BATCH_TOKENS[self.device.type]
        with tqdm(total=len(order), desc=progress, unit="caption", disable=progress is None, leave=False) as bar:
            for start, stop in token_batches([tokens.lengths[index] for index in order], budget):
                batch = order[start:stop]
                embedded_BD = self.forward([tokens.rows[index] for index in batch])
                if self.settings.normalise:
                    embedded_BD = F.normalize(embedded_BD, dim=-1)
                embeddings[batch] = embedded_BD.cpu().numpy()
                bar.update(len(batch))
        row = {caption: index for index, caption in enumerate(distinct)}
        given = [row[caption] for caption in captions]
        return Encoded(embeddings[given], sum(tokens.truncated[index] for index in given))


def resolve_precision(precision: str) -> str:
    """The precision that `auto` means on this machine: bf16 where its GPU, or else its CPU, computes in it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not there before torch 2.13
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of batches of at most `budget` tokens with their padding; a longer row is a batch of its own.

    `lengths` descend, so the first of a batch is its width. Rows without a token, which are last, are in no batch.
    """
    start = 0
    while start < len(lengths) and lengths[start]:
        stop = min(start + max(1, budget // lengths[start]), len(lengths))
        while lengths[stop - 1] == 0:
            stop -= 1
        yield start, stop
        start = stop


def tokenise_texts(tokenizer: Any, texts: list[str], max_length: int) -> Tokenised:
    """Ids of each text with its special tokens, truncated to `max_length` from the right by a transformers tokenizer."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
    return Tokenised(encoded["input_ids"], [len(ids) for ids in encoded["input_ids"]], overflowed(encoded))


def overflowed(encoded: Any) -> list[bool]:
    """Which texts of a transformers BatchEncoding were truncated.

    Raises:
        ValueError: the tokenizer is not a fast one, which alone tells.
    """
    if encoded.encodings is None:
        raise ValueError("expected a fast tokenizer (tokenizer.json), which tells how many captions it truncates")
    return [bool(encoding.overflowing) for encoding in encoded.encodings]


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """int64 [len(rows), longest row], filled with `value` on one side."""
    longest = max(len(row) for row in rows)
    padded_BL = np.full((len(rows), longest), value, np.int64)
    for out_L, row in zip(padded_BL, rows, strict=True):
        out_L[longest - len(row) if side == "left" else 0 :][: len(row)] = row
    return torch.from_numpy(padded_BL)


def padding_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """bool [len(rows), longest row], True on tokens; the padding is on the right."""
    lengths_B = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths_B.max())) < lengths_B[:, None]
