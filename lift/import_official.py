"""`lift import`: a checkpoint of the official LIFT code in, an encoder folder out, as `lift export` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase

from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import read_json, sha256_file
from lift.export import write_encoder_folder
from lift.model import ClipModel, LiftModel
from lift.official import Architecture, from_official, read_architecture, read_checkpoint
from lift.settings import ClipTextSettings, ImportSettings
from lift.text_encoders import describe_without_loading
from lift.text_side import clip_tokenizer
from lift.transforms import TextTransform

HEAD_WIDTH = 64
HARMLESS = frozenset({"image_size", "head_width", "patch_dropout", "pos_embed_type", "output_tokens"}) | {
    "attn_pooler_queries",
    "attn_pooler_heads",
    "timm_pool",
    "timm_proj",
}
"""Keys of `vision_cfg` that are read elsewhere, or without effect as long as the switches that would use them are off."""


def import_official(settings: ImportSettings) -> None:
    """Command `lift import`.

    Raises:
        UserError: the file is no official checkpoint, its tensors do not fit each other or the model configuration, or the text
            encoder or tokenizer given cannot be used.
    """
    path, out = settings.checkpoint, given(settings.out, "out")
    checkpoint = read_checkpoint(path)
    found = read_architecture(checkpoint.state, path)
    if found.clip and settings.text_encoder is not None:
        raise UserError(f"{path}: is a CLIP baseline, which brings its own text tower. Leave --text_encoder out.")
    if not found.clip and settings.tokenizer is not None:
        raise UserError(f"{path}: is a LIFT model, which has no text tower. Leave --tokenizer out; see --text_encoder.")
    head_width = _head_width(settings, found)
    vision = _vision_config(found, head_width, path)
    text_tower = _text_tower(settings, found, path) if found.clip else None
    with torch.device("meta"):  # for the shapes only
        model = (
            ClipModel(vision, text_tower[0]) if text_tower else LiftModel(vision, TextTransform("none", found.embedding_dim))
        )
    state, ignored = from_official(checkpoint.state, model.state_dict(), path)
    description = {
        "objective": _objective(found, state),
        "text_transform": "none",
        "text": {"kind": "clip_text_tower"} if found.clip else _text(settings),
        "step": None,
        "seed": None,
        "imported": {
            "file": path.name,
            "sha256": sha256_file(path),
            "name": checkpoint.name,
            "epoch": checkpoint.epoch,
            "head_width": head_width,
            "ignored": ignored,
        },
    }
    write_encoder_folder(out, state, vision, text_tower, description)
    what = "CLIP baseline (exact GELU; OpenAI's own weights are QuickGELU and must not be read so)" if found.clip else "LIFT"
    left = f"; not needed and left out: {', '.join(ignored)}" if ignored else ""
    print(f"{out}: {what}, {found.layers} layers of width {found.width}, {found.embedding_dim} dimensions, from {path}{left}")
    if not found.clip and settings.text_encoder is None:
        print("No --text_encoder was given: the folder embeds images; texts need the encoder that it was aligned to.")
    if found.clip and settings.tokenizer is None:
        print("No --tokenizer was given: the folder embeds images; texts need CLIP's own tokenizer.")


def _objective(found: Architecture, state: Mapping[str, Tensor]) -> str:
    if found.clip:
        return "clip"
    return "contrastive" if "log_scale" in state else "cosine"


def _text(settings: ImportSettings) -> dict[str, Any]:
    """The text encoder given, or the published one, of which no copy is known (revision null)."""
    if settings.text_encoder is not None:
        return describe_without_loading(settings.text_encoder)
    return {"kind": "nv_embed", "path": None, "revision": None, "prompt": "", "max_length": None}


def _head_width(settings: ImportSettings, found: Architecture) -> int:
    """Features of one attention head, after checking everything else that the model configuration says."""
    path = settings.model_config
    if path is None:
        return settings.head_width or HEAD_WIDTH
    config = read_json(path, "the official model's configuration")
    vision = config.get("vision_cfg") if isinstance(config, dict) else None
    if not isinstance(vision, dict):
        raise UserError(f"{path}: expected an open_clip model configuration with 'vision_cfg', found none.")
    # image size and caption length may be overridden when the official training starts, so the weights alone say them
    shared = {"patch_size": found.patch_size, "width": found.width, "layers": found.layers}
    vision = {"pool_type": "tok", **vision}
    _check(
        path,
        "vision_cfg.",
        vision,
        shared | {"pool_type": "tok" if found.clip else "avg", "mlp_ratio": found.intermediate_size / found.width},
    )
    if config.get("quick_gelu"):
        raise UserError(f"{path}: 'quick_gelu' is set; only the published architecture (exact GELU) can be imported.")
    head_width = vision.get("head_width", HEAD_WIDTH)
    if not isinstance(head_width, int) or head_width < 1:
        raise UserError(f"{path}: 'vision_cfg.head_width' is {head_width!r}; expected a positive whole number.")
    if settings.head_width not in (None, head_width):
        raise UserError(f"{path}: says head_width {head_width}, --head_width says {settings.head_width}. Give one of them.")
    return head_width


def _check(path: Path, prefix: str, config: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses a value that the weights contradict, and a set switch that the published architecture does not have."""
    for key, value in config.items():
        if key in wanted and value != wanted[key]:
            raise UserError(
                f"{path}: '{prefix}{key}' is {value!r}, but the checkpoint needs {wanted[key]!r}. Give its own file."
            )
        if key not in wanted and key not in HARMLESS and value:
            raise UserError(
                f"{path}: '{prefix}{key}' is {value!r}; only the published architecture, without it, can be imported."
            )


def _heads(width: int, head_width: int, what: str, path: Path) -> int:
    if width % head_width:
        raise UserError(
            f"{path}: the {what} of width {width} does not split into attention heads of {head_width}. "
            "Give the model's own --model_config, or --head_width."
        )
    return width // head_width


def _vision_config(found: Architecture, head_width: int, path: Path) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=found.image_size,
        patch_size=found.patch_size,
        hidden_size=found.width,
        intermediate_size=found.intermediate_size,
        num_hidden_layers=found.layers,
        num_attention_heads=_heads(found.width, head_width, "image encoder", path),
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def _text_tower(
    settings: ImportSettings, found: Architecture, path: Path
) -> tuple[CLIPTextConfig, PreTrainedTokenizerBase | None]:
    """The text tower's configuration; the official code takes its feature at the largest id, CLIP's end token."""
    sizes = found.text or {}
    width, vocabulary = sizes["width"], sizes["vocabulary"]
    tokenizer = None
    if settings.tokenizer is not None:
        tokenizer = clip_tokenizer(
            ClipTextSettings(tokenizer=settings.tokenizer, context_length=sizes["context_length"]), captions=[]
        )
        if tokenizer.eos_token_id != vocabulary - 1:
            raise UserError(
                f"{settings.tokenizer}: its end token is {tokenizer.eos_token_id}, the checkpoint takes the text feature at "
                f"{vocabulary - 1}. Give the tokenizer that the checkpoint was trained with (CLIP's own)."
            )
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=_heads(width, HEAD_WIDTH, "text tower", path),
        max_position_embeddings=sizes["context_length"],
        projection_dim=found.embedding_dim,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return config, tokenizer
