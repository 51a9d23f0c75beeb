"""Tiny models under the official names, imported as a user would, and the settings of a tiny run to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lift.import_official import import_official
from lift.settings import (
    ClipTextSettings,
    ImportSettings,
    PretrainSettings,
    SourceSettings,
    TextEncoderSettings,
    VisionSettings,
)

WIDTH, LAYERS, PATCH, GRID, HEADS, DIM = 128, 2, 8, 2, 2, 24


def block_weights(prefix: str, layers: int, width: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        block = f"{prefix}resblocks.{i}."
        for name, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def vision_weights() -> dict[str, Tensor]:
    state = {
        "visual.class_embedding": torch.randn(WIDTH),
        "visual.positional_embedding": torch.randn(GRID**2 + 1, WIDTH),
        "visual.conv1.weight": torch.randn(WIDTH, 3, PATCH, PATCH) * 0.1,
    }
    state |= {f"visual.{norm}.{kind}": torch.randn(WIDTH) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    return state | block_weights("visual.transformer.", LAYERS, WIDTH)


def lift_state(seed: int = 0) -> dict[str, Tensor]:
    """A tiny LIFT under the official names."""
    torch.manual_seed(seed)
    state = {"logit_scale": torch.tensor(2.5)} | vision_weights()
    state |= {"mlp_projector.projector.0.weight": torch.randn(DIM, WIDTH), "mlp_projector.projector.0.bias": torch.randn(DIM)}
    return state | {
        "mlp_projector.projector.2.weight": torch.randn(DIM, DIM),
        "mlp_projector.projector.2.bias": torch.randn(DIM),
    }


def clip_state(vocabulary: int, context: int = 12) -> dict[str, Tensor]:
    """A tiny CLIP baseline under the official names; text width 64, one layer."""
    torch.manual_seed(1)
    state = {"logit_scale": torch.tensor(2.5), "visual.proj": torch.randn(WIDTH, DIM)} | vision_weights()
    state |= {"positional_embedding": torch.randn(context, 64), "token_embedding.weight": torch.randn(vocabulary, 64)}
    state |= {"text_projection": torch.randn(64, DIM), "ln_final.weight": torch.randn(64), "ln_final.bias": torch.randn(64)}
    return state | block_weights("transformer.", 1, 64)


def save(path: Path, state: dict[str, Tensor], **rest: object) -> Path:
    torch.save({"epoch": 3, "name": "tiny", "state_dict": {f"module.{k}": v for k, v in state.items()}, **rest}, path)
    return path


def run_import(path: Path, out: Path, **rest: object) -> Path:
    import_official(ImportSettings(checkpoint=path, out=out, **rest))  # type: ignore[arg-type]
    return out


def tiny_run(pairs: Path, llm: Path, out: Path, **changes: Any) -> PretrainSettings:
    """Three steps on the tiny pairs."""
    settings: dict[str, Any] = {
        "data": [SourceSettings(kind="webdataset", path=pairs)],
        "text_encoder": TextEncoderSettings(kind="causal_lm", path=str(llm)),
        "vision": VisionSettings(image_size=16, patch_size=8, width=16, layers=2, heads=2),
        "clip_text": ClipTextSettings(width=16, layers=1, heads=2, context_length=16, embedding_dim=16, vocabulary_size=300),
        "batch_size": 8,
        "workers": 0,
    }
    return PretrainSettings(out=out, **settings | changes)
