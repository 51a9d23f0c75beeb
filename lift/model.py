"""The two models that are compared: LIFT (image encoder and head against fixed text embeddings) and the CLIP baseline.

Both take pixel values and the text side of a batch and give L2-normalised features in one space. Both start from the same
image encoder weights for the same seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lift.settings import ClipTextSettings, PretrainSettings, VisionSettings
from lift.transforms import TextTransform

INITIAL_LOG_SCALE = math.log(1 / 0.07)
SIGLIP_LOG_SCALE, SIGLIP_BIAS = math.log(10.0), -10.0

Model = TypeVar("Model", "LiftModel", "ClipModel")


def vision_config(settings: VisionSettings) -> CLIPVisionConfig:
    """CLIP's ViT with exact GELU, as the official LIFT."""
    return CLIPVisionConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.width,
        intermediate_size=int(settings.width * settings.mlp_ratio),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def mean_patch_feature(vision: CLIPVisionModel, pixel_values_B3HW: Tensor, kept_BK: Tensor | None = None) -> Tensor:
    """[B, width]: `ln_post` on the patch tokens, then their mean; the class token is left out (official LIFT pooling)."""
    return vision.post_layernorm(_tokens(vision, pixel_values_B3HW, kept_BK)[:, 1:]).mean(dim=1)


def class_token_feature(vision: CLIPVisionModel, pixel_values_B3HW: Tensor, kept_BK: Tensor | None = None) -> Tensor:
    """[B, width]: `ln_post` on the class token (CLIP pooling)."""
    return vision.post_layernorm(_tokens(vision, pixel_values_B3HW, kept_BK)[:, 0])


def _tokens(vision: CLIPVisionModel, pixel_values_B3HW: Tensor, kept_BK: Tensor | None) -> Tensor:
    """[B, 1 + patches, width]: class token and patch tokens after the last block; only the patches `kept_BK` (FLIP)."""
    if kept_BK is None:
        return vision(pixel_values=pixel_values_B3HW).last_hidden_state
    tokens_BLW = vision.embeddings(pixel_values_B3HW)
    index_BK1 = (kept_BK + 1)[..., None]  # after the class token
    patches_BKW = tokens_BLW.gather(1, index_BK1.expand(-1, -1, tokens_BLW.shape[-1]))
    kept_BLW = torch.cat([tokens_BLW[:, :1], patches_BKW], dim=1)
    return vision.encoder(inputs_embeds=vision.pre_layrnorm(kept_BLW)).last_hidden_state


def kept_patches(settings: PretrainSettings, step: int, rank: int, world: int) -> Tensor | None:
    """[B, K] numbers of the patches that this process's images keep in `step`; None when all are kept.

    Drawn for the whole batch from (seed, step), so that it does not depend on the number of processes.
    """
    if settings.patch_dropout == 0:
        return None
    patches = (settings.vision.image_size // settings.vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    share = settings.batch_size // world
    draw_BN = torch.rand(settings.batch_size, patches, generator=generator)[rank * share : (rank + 1) * share]
    return draw_BN.argsort(dim=1)[:, : max(1, round(patches * (1 - settings.patch_dropout)))]


class Features(NamedTuple):
    """What a model gives for a batch, and the scalars of the loss that it learns."""

    image_BD: Tensor
    """L2-normalised, float32."""
    text_BD: Tensor | None
    """L2-normalised, float32, where the text side is trained."""
    log_scale_1: Tensor
    bias_1: Tensor | None


def lift_head(width: int, hidden: int, output: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, output))


class LiftModel(nn.Module):
    """Image encoder, mean of patch tokens, head Linear-GELU-Linear, learned temperature; sigmoid also has a learned bias.

    The head is as wide as the text embeddings; what it gives has the dimensions that `transform` leaves of them.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
        transform: TextTransform,
        log_scale: float = INITIAL_LOG_SCALE,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(config)
        width = config.hidden_size
        self.head = lift_head(width, transform.dimension, transform.output_dimension)
        self.text_transform = transform
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))  # DeepSpeed refuses 0-dimensional parameters
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def text_features(self, embeddings_ND: Tensor) -> Tensor:
        """Raw embeddings of the frozen text encoder, of any float type, to L2-normalised float32 ones of the joint space."""
        return self.text_transform(embeddings_ND)

    def forward(
        self, pixel_values_B3HW: Tensor, tokens: dict[str, Tensor] | None = None, kept_BK: Tensor | None = None
    ) -> Features:
        feature_BW = mean_patch_feature(self.vision, pixel_values_B3HW, kept_BK)
        return Features(F.normalize(self.head(feature_BW).float(), dim=-1), None, self.log_scale, self.bias)


class ClipModel(nn.Module):
    """The towers of transformers' CLIPModel, from scratch, trained jointly: the baseline."""

    def __init__(self, config: CLIPVisionConfig, text_config: CLIPTextConfig, log_scale: float = INITIAL_LOG_SCALE) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(config)
        self.head = nn.Linear(config.hidden_size, int(text_config.projection_dim or 0), bias=False)
        nn.init.normal_(self.head.weight, std=config.hidden_size**-0.5)
        self.text_tower = CLIPTextModelWithProjection(text_config)
        self.log_scale = nn.Parameter(torch.tensor([log_scale]))

    def text_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """`input_ids` and `attention_mask`, [B, L], to L2-normalised float32 features."""
        return F.normalize(self.text_tower(**tokens).text_embeds.float(), dim=-1)

    def forward(
        self, pixel_values_B3HW: Tensor, tokens: dict[str, Tensor] | None = None, kept_BK: Tensor | None = None
    ) -> Features:
        """`tokens` are needed; without them only the images are encoded."""
        feature_BW = class_token_feature(self.vision, pixel_values_B3HW, kept_BK)
        image_BD = F.normalize(self.head(feature_BW).float(), dim=-1)
        return Features(image_BD, None if tokens is None else self.text_features(tokens), self.log_scale, None)


def clip_text_config(settings: ClipTextSettings, tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context_length,
        projection_dim=settings.embedding_dim,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_lift(settings: PretrainSettings, transform: TextTransform) -> LiftModel:
    config = vision_config(settings.vision)
    torch.manual_seed(settings.seed)
    sigmoid = settings.objective == "sigmoid"
    log_scale = _initial_log_scale(settings, SIGLIP_LOG_SCALE if sigmoid else INITIAL_LOG_SCALE)
    model = LiftModel(config, transform, log_scale, SIGLIP_BIAS if sigmoid else None)
    if settings.objective == "cosine":
        model.log_scale.requires_grad_(False)
    return _with_options(model, settings)


def build_clip(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> ClipModel:
    config = vision_config(settings.vision)
    torch.manual_seed(settings.seed)
    log_scale = _initial_log_scale(settings, INITIAL_LOG_SCALE)
    return _with_options(ClipModel(config, clip_text_config(settings.clip_text, tokenizer), log_scale), settings)


def _initial_log_scale(settings: PretrainSettings, default: float) -> float:
    return default if settings.initial_logit_scale is None else math.log(settings.initial_logit_scale)


def _with_options(model: Model, settings: PretrainSettings) -> Model:
    """The model itself; neither option changes its weights or their names."""
    if settings.gradient_checkpointing:
        for tower in (module for module in model.children() if isinstance(module, PreTrainedModel)):
            tower.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        model.compile()
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on parameters with two or more dimensions; none on gains, biases, class token and temperature."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
