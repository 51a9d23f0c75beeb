"""Settings of the demo: one size decides how much is rendered and how long each stage trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything; chosen by name."""

    train_pairs: int
    """Image-caption pairs for pretraining."""
    held_out_pairs: int
    """Pairs for retrieval."""
    hard_negatives: int
    """Items of each of the seven kinds."""
    question_groups: int
    """Questions of each template; each is asked in four rotations."""
    captioned_images: int
    """LLaVA stage 1."""
    conversations: int
    """LLaVA stage 2, three questions each."""
    texts: int
    """Texts the language model learns from, once."""
    pretrain_epochs: int
    """Passes of LIFT and CLIP over the pairs."""
    stage2_epochs: int
    """Passes of instruction tuning over the conversations."""


SIZES = {
    "tiny": Size(
        train_pairs=512, held_out_pairs=64, hard_negatives=16, question_groups=2, captioned_images=128, conversations=128,
        texts=640, pretrain_epochs=1, stage2_epochs=1,
    ),
    "small": Size(
        train_pairs=8192, held_out_pairs=500, hard_negatives=300, question_groups=50, captioned_images=4096,
        conversations=4096, texts=32_000, pretrain_epochs=5, stage2_epochs=2,
    ),
    "full": Size(
        train_pairs=32_768, held_out_pairs=1000, hard_negatives=500, question_groups=150, captioned_images=16_384,
        conversations=32_768, texts=120_000, pretrain_epochs=16, stage2_epochs=2,
    ),
}  # fmt: skip
IMAGE_SIZE = 64


@dataclass(kw_only=True)
class RunSettings:
    """Runs the whole chain on the demo world: embed, pretrain LIFT and CLIP, tune LLaVA on both, evaluate, compare."""

    out: Path | None = None
    """Folder for everything the demo makes, runs/demo (runs/demo_SIZE for other sizes); what is finished there is reused."""
    size: Literal["tiny", "small", "full"] = "small"
    """tiny checks that the chain works; small takes a quarter of an hour on two cores; full is for a longer wait."""
    seed: int = 0
    """Seed of the world and of every training."""
    until: str | None = None
    """Name of the last stage to run; all of them by default."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs", "demo" if self.size == "small" else f"demo_{self.size}")


@dataclass(kw_only=True)
class WorldSettings:
    """Renders the demo world alone: pairs, hard negatives, conversations, questions, texts."""

    out: Path
    """Folder to write."""
    size: Literal["tiny", "small", "full"] = "small"
    """How much to render."""
    seed: int = 0
    """Seed of the scenes."""


@dataclass(kw_only=True)
class LanguageModelSettings:
    """Trains the demo's causal language model on the world's texts."""

    texts: Path
    """JSON lines with `text` (learned whole) or `messages` (answers learned)."""
    out: Path
    """Language-model folder to write."""
    width: int = 128
    """Hidden size."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 8
    """Attention heads."""
    epochs: int = 1
    """Passes over the texts."""
    batch_size: int = 16
    """Texts in one step."""
    learning_rate: float = 5e-4
    """Peak learning rate; at 2e-3 the model stayed on its first plateau."""
    seed: int = 0
    """Seed of weights and order."""


@dataclass(kw_only=True)
class TextEncodersSettings:
    """Pretrains LIFT against every text side of the demo and CLIP beside it, and writes the table of hard negatives."""

    out: Path | None = None
    """Folder of a demo, as for `run`; what is missing in it is made."""
    size: Literal["tiny", "small", "full"] = "small"
    """Size of the demo."""
    seed: int = 0
    """Seed of the world and of every training."""
