"""Settings of building a LLaVA model, and of turning one into the original LLaVA's format and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class LlavaParts:
    """What a LLaVA model is built from."""

    vision_tower: Path
    """Encoder folder: a transformers CLIPVisionModel in safetensors with its preprocessor_config.json."""
    llm: Path
    """Language-model folder: any transformers causal language model with a fast tokenizer and a chat template."""
    chat_template: str | None = None
    """`vicuna_v1` or a Jinja file; takes the place of the language model's own chat template."""
    seed: int = 0
    """Seed of the projector's first weights."""


@dataclass(kw_only=True)
class BuildSettings(LlavaParts):
    """Builds a LLaVA model from an encoder folder and a language-model folder."""

    out: Path
    """Folder to write; it must not exist."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Format of the weights written."""


@dataclass
class ImportSettings:
    """Turns a checkpoint of the original LLaVA, or its mm_projector.bin, into a folder that transformers loads."""

    source: Path
    """Checkpoint folder whose config.json has `mm_*` keys, or an `mm_projector.bin` or the folder of one."""
    out: Path | None = None
    """Folder to write; it must not exist."""
    vision_tower: Path | None = None
    """The vision tower's folder; by default the one that the checkpoint names."""
    model_base: Path | None = None
    """For a projector alone: the LLaVA folder to copy, with this projector in the place of its own."""
    chat_template: str = "vicuna_v1"
    """`vicuna_v1`, LLaVA-1.5's own, or a Jinja file."""

    def __post_init__(self) -> None:
        if self.out is None:
            raise ValueError("out: expected the folder to write, as in --out DIR")


@dataclass
class ExportSettings:
    """Writes a LLaVA folder in the format of the original LLaVA."""

    folder: Path
    """LLaVA folder, as `lmm build`, `lmm train` or `lmm import` wrote it."""
    out: Path | None = None
    """Folder to write; it must not exist."""
    format: Literal["llava"] = "llava"
    """The original LLaVA's."""
    part: Literal["all", "projector"] = "all"
    """`projector`: only `mm_projector.bin`, as the original's pretraining stage writes it."""
    mm_vision_tower: str | None = None
    """What the checkpoint names as its vision tower; by default the full path of OUT/vision_tower, which must not move then."""

    def __post_init__(self) -> None:
        if self.out is None:
            raise ValueError("out: expected the folder to write, as in --out DIR")
