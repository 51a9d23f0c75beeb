"""Settings of the studies beside the benchmarks: `lift-eval cost`, `text`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lift.common.checks import at_least, given


@dataclass
class CostSettings:
    """Counts FLOPs and parameters, and measures peak memory, of a training sample for LIFT and CLIP by caption length."""

    out: Path
    """Folder for cost.json, cost.csv and cost.html."""
    lift: Path | None = None
    """Recipe of LIFT (YAML of `lift pretrain`); by default the paper's ViT-B/16. Its data need not be there."""
    clip: Path | None = None
    """Recipe of the CLIP baseline; by default the paper's."""
    embedding_dim: int | None = None
    """Dimension of LIFT's text embeddings: by default 4096 (NV-Embed-v2), or that of the recipe's encoder where it is known."""
    lengths: list[int] = field(default_factory=lambda: [77, 128, 323])
    """Caption lengths in tokens that the table shows; the plot goes from 16 to 512 in any case."""
    memory_batch_size: int = 128
    """Samples in the training step whose peak memory is measured (CUDA only)."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("--lengths: expected at least one caption length, as in [77,128], found none.")
        if min(self.lengths) < 2:
            raise ValueError(f"--lengths: expected at least 2, found {min(self.lengths)}.")
        at_least(self, 1, "memory_batch_size", "embedding_dim", prefix="--")


@dataclass
class TextSettings:
    """Compares two text encoders on pairs close in words and far in meaning, and on pairs far in words and close in meaning."""

    encoder_a: str
    """Any encoder that `lift-eval encoder` takes, the folder of a frozen text encoder, or `minilm`."""
    encoder_b: str
    """The same for the second encoder."""
    out: Path | None = None
    """Folder for text.json, pairs.csv and scatter.html."""
    pairs: Path | None = None
    """Sentence pairs (.json or .jsonl) instead of the built-in ones: objects with first, second, same_meaning and kind."""
    captions: Path | None = None
    """Captions from which pairs are taken instead."""
    captions_format: Literal["lines", "jsonl", "coco"] | None = None
    """lines: one caption a line; jsonl: objects with `caption` and, where known, `image`; coco: COCO captions. By the suffix
    when left out: .txt is lines, .jsonl is jsonl, .json is coco."""
    high_overlap: float = 0.6
    """Captions that share at least this share of their words (Jaccard) are close in words."""
    low_overlap: float = 0.15
    """Captions that share at most this share of their words are far in words."""
    max_pairs: int = 2000
    """Pairs of each kind taken from captions at most, drawn with the seed."""
    max_captions: int = 100_000
    """Captions looked at, at most; more are sampled with the seed. Without images a fifth of that, as all are encoded."""
    resamples: int = 1000
    """Bootstrap resamples of the pairs."""
    seed: int = 0
    """Seed of the samples and of the bootstrap."""
    max_length: int = 77
    """Tokens that a frozen text encoder reads of a sentence."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of a frozen text encoder's weights; an encoder folder has its own."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        if self.pairs is not None and self.captions is not None:
            raise ValueError("--pairs and --captions: give one of them, or neither for the built-in pairs.")
        if not 0 <= self.low_overlap < self.high_overlap <= 1:
            raise ValueError(
                f"--low_overlap and --high_overlap: expected 0 <= low < high <= 1, found {self.low_overlap} and "
                f"{self.high_overlap}."
            )
        at_least(self, 2, "max_pairs", "max_captions", "max_length", prefix="--")
        at_least(self, 100, "resamples", prefix="--")
        if self.captions is not None and self.captions_format is None:
            formats: dict[str, Literal["lines", "jsonl", "coco"]] = {".txt": "lines", ".jsonl": "jsonl", ".json": "coco"}
            if self.captions.suffix not in formats:
                raise ValueError(f"--captions: the suffix of {self.captions.name} tells no format. Give --captions_format.")
            self.captions_format = formats[self.captions.suffix]
