"""The two models that are compared: LIFT (image encoder and head against fixed text embeddings) and the CLIP baseline.

Both take pixel values and the text side of a batch and give L2-normalised features in one space. Both start from the same
image encoder weights for the same seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase

from lift.settings import ClipTextSettings, PretrainSettings, VisionSettings
from lift.transforms import TextTransform

INITIAL_LOG_SCALE = math.log(1 / 0.07)
MAX_LOG_SCALE = math.log(100.0)


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


def mean_patch_feature(vision: CLIPVisionModel, pixel_values_B3HW: Tensor) -> Tensor:
    """[B, width]: `ln_post` on the patch tokens, then their mean; the class token is left out (official LIFT pooling)."""
    tokens_BLW = vision(pixel_values=pixel_values_B3HW).last_hidden_state
    return vision.post_layernorm(tokens_BLW[:, 1:]).mean(dim=1)


def class_token_feature(vision: CLIPVisionModel, pixel_values_B3HW: Tensor) -> Tensor:
    """[B, width]: `ln_post` on the class token (CLIP pooling)."""
    return vision(pixel_values=pixel_values_B3HW).pooler_output


def lift_head(width: int, hidden: int, output: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, output))


class LiftModel(nn.Module):
    """Image encoder, mean of patch tokens, head Linear-GELU-Linear, learned temperature.

    The head is as wide as the text embeddings; what it gives has the dimensions that `transform` leaves of them.
    """

    def __init__(self, config: CLIPVisionConfig, embedding_dim: int, transform: TextTransform) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(config)
        width = config.hidden_size
        self.head = lift_head(width, embedding_dim, transform.output_dimension)
        self.text_transform = transform
        self.log_scale = nn.Parameter(torch.tensor([INITIAL_LOG_SCALE]))  # DeepSpeed refuses 0-dimensional parameters

    def image_features(self, pixel_values_B3HW: Tensor) -> Tensor:
        return F.normalize(self.head(mean_patch_feature(self.vision, pixel_values_B3HW)).float(), dim=-1)

    def text_features(self, text: dict[str, Tensor]) -> Tensor:
        """`text["embeddings"]`: raw embeddings of the frozen text encoder, [B, D] of any float type."""
        return self.text_transform(text["embeddings"])

    def forward(self, pixel_values_B3HW: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.image_features(pixel_values_B3HW), self.text_features(text), self.log_scale


class ClipModel(nn.Module):
    """The towers of transformers' CLIPModel, from scratch, trained jointly: the baseline."""

    def __init__(self, config: CLIPVisionConfig, text_config: CLIPTextConfig) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(config)
        self.head = nn.Linear(config.hidden_size, int(text_config.projection_dim or 0), bias=False)
        nn.init.normal_(self.head.weight, std=config.hidden_size**-0.5)
        self.text_tower = CLIPTextModelWithProjection(text_config)
        self.log_scale = nn.Parameter(torch.tensor([INITIAL_LOG_SCALE]))

    def image_features(self, pixel_values_B3HW: Tensor) -> Tensor:
        return F.normalize(self.head(class_token_feature(self.vision, pixel_values_B3HW)).float(), dim=-1)

    def text_features(self, text: dict[str, Tensor]) -> Tensor:
        """`text`: `input_ids` and `attention_mask`, [B, L]."""
        return F.normalize(self.text_tower(**text).text_embeds.float(), dim=-1)

    def forward(self, pixel_values_B3HW: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.image_features(pixel_values_B3HW), self.text_features(text), self.log_scale


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
    return LiftModel(config, transform.dimension, transform)


def build_clip(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> ClipModel:
    config = vision_config(settings.vision)
    torch.manual_seed(settings.seed)
    return ClipModel(config, clip_text_config(settings.clip_text, tokenizer))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on parameters with two or more dimensions; none on gains, biases, class token and temperature."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
