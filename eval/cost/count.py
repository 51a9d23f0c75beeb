"""What one training sample costs: models come in as settings, FLOPs by PyTorch's counter and parameters go out.

The models are those of `lift.model`, on meta tensors: nothing is computed or allocated, so that the paper's scale is counted
in seconds on any machine. `DEFINITION` says what is counted; the closed form of it is in `lift.flops`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase

from lift.common.errors import UserError
from lift.common.files import require_file
from lift.common.settings import check_keys, parse_settings
from lift.model import ClipModel, LiftModel, clip_text_config, vision_config
from lift.settings import ClipTextSettings, PretrainSettings, TextTransformSettings, VisionSettings
from lift.transforms import TextTransform

DEFINITION = (
    "FLOPs of the forward and backward pass of one image-caption pair: 2 for each multiply-add, in matrix products, "
    "convolutions and attention. The image encoder with its head (LIFT's MLP, CLIP's projection) and CLIP's text tower are "
    "counted; the gradient of the pixels is not, because nothing needs it. Left out are the loss, normalisations and "
    "activations, the second forward pass of gradient checkpointing, the optimiser, and LIFT's text embeddings, which are made "
    "once before training. All n tokens of a caption count, padding included, as the tower computes them."
)
NV_EMBED_DIMENSION, MINILM_DIMENSION = 4096, 384
BATCH = 2
"""Samples in the counted batch; the count is exactly linear in them."""


@dataclass(frozen=True)
class LiftRecipe:
    vision: VisionSettings = field(default_factory=VisionSettings)
    embedding_dim: int = NV_EMBED_DIMENSION
    """Dimension of the text embeddings."""
    transform: TextTransformSettings = field(default_factory=TextTransformSettings)
    checkpointing: bool = True
    precision: str = "bf16"

    def build(self, tokens: int = 0) -> LiftModel:
        """On the current default device; a caption's length changes nothing."""
        transform = TextTransform(self.transform.kind, self.embedding_dim, self.transform.dimensions)
        return LiftModel(vision_config(self.vision), transform)


@dataclass(frozen=True)
class ClipRecipe:
    vision: VisionSettings = field(default_factory=VisionSettings)
    text: ClipTextSettings = field(default_factory=ClipTextSettings)
    checkpointing: bool = True
    precision: str = "bf16"

    def build(self, tokens: int) -> ClipModel:
        """On the current default device, with a context of `tokens`, as the official code sets it to the caption length."""
        text = replace(self.text, context_length=tokens)
        tokenizer = cast(PreTrainedTokenizerBase, _Vocabulary(text.vocabulary_size))
        return ClipModel(vision_config(self.vision), clip_text_config(text, tokenizer))


class _Vocabulary:
    """What `clip_text_config` reads of a tokenizer; the start and end tokens are the last two, as in CLIP's own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bos_token_id = size - 2
        self.eos_token_id = self.pad_token_id = size - 1

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Count:
    flops: int
    """Forward and backward, of one sample."""
    parameters: int
    """Trained ones."""


def count_lift(recipe: LiftRecipe) -> Count:
    with torch.device("meta"):
        model = recipe.build()
        pixels_B3HW = _pixels(recipe.vision)
        return _count(model, lambda: model(pixels_B3HW).image_BD)


def count_clip(recipe: ClipRecipe, tokens: int) -> Count:
    """Both towers with captions of `tokens` tokens."""
    with torch.device("meta"):
        model = recipe.build(tokens)
        pixels_B3HW = _pixels(recipe.vision)
        # an attention mask would be looked into, which meta tensors do not allow; the tower is causal, padding comes last
        ids_BL = torch.ones(BATCH, tokens, dtype=torch.long)

        def features() -> Tensor:
            found = model(pixels_B3HW, {"input_ids": ids_BL})
            assert found.text_BD is not None
            return found.image_BD.sum() + found.text_BD.sum()

        return _count(model, features)


def _pixels(vision: VisionSettings) -> Tensor:
    return torch.empty(BATCH, 3, vision.image_size, vision.image_size)


def _count(model: nn.Module, features: Any) -> Count:
    # the counter sees attention only where it is computed as matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features().sum().backward()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Count(counter.get_total_flops() // BATCH, parameters)


def read_lift(path: Path | None, embedding_dim: int | None) -> LiftRecipe:
    """Raises UserError when the recipe is unreadable, is CLIP's, or does not tell the dimension of its text embeddings."""
    if path is None:
        return LiftRecipe(embedding_dim=embedding_dim or NV_EMBED_DIMENSION)
    values = _read_recipe(path)
    if values.get("objective") == "clip":
        raise UserError(f"{path}: expected a recipe of LIFT after --lift, found objective clip. Give it after --clip.")
    dimension = embedding_dim or _known_dimension(values.get("text_encoder"))
    if dimension is None:
        raise UserError(f"{path}: does not tell the dimension of its text embeddings. Give --embedding_dim.")
    transform = _section(path, values, "text_transform", TextTransformSettings)
    return LiftRecipe(_section(path, values, "vision", VisionSettings), dimension, transform, **_training(values))


def read_clip(path: Path | None) -> ClipRecipe:
    """Raises UserError when the recipe is unreadable or is not CLIP's."""
    if path is None:
        return ClipRecipe()
    values = _read_recipe(path)
    if values.get("objective") != "clip":
        raise UserError(f"{path}: expected a recipe with objective clip after --clip, found {values.get('objective')}.")
    text = _section(path, values, "clip_text", ClipTextSettings)
    return ClipRecipe(_section(path, values, "vision", VisionSettings), text, **_training(values))


def _read_recipe(path: Path) -> dict[str, Any]:
    """The settings as written: variables such as ${LIFT_DATA} stay, because no data is read."""
    try:
        values = yaml.safe_load(require_file(path, "a recipe of lift pretrain (YAML)").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(values).__name__}.")
    check_keys(PretrainSettings, values, str(path))
    return values


def _section(path: Path, values: dict[str, Any], name: str, settings_class: Any) -> Any:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name}: expected keys and values, found a {type(section).__name__}.")
    arguments = [word for key, value in section.items() if value is not None for word in (f"--{key}", str(value))]
    return parse_settings(settings_class, arguments, f"{path}: {name}", "")


def _training(values: dict[str, Any]) -> dict[str, Any]:
    return {"checkpointing": bool(values.get("gradient_checkpointing")), "precision": str(values.get("precision", "fp32"))}


def _known_dimension(text_encoder: Any) -> int | None:
    settings = text_encoder if isinstance(text_encoder, dict) else {}
    kind = settings.get("kind") or ("minilm" if text_encoder is None else None)
    return {"nv_embed": NV_EMBED_DIMENSION, "minilm": MINILM_DIMENSION}.get(kind or "")
