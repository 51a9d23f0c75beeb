"""What the original LLaVA (v1.2.2) and transformers 5 call the same things: weights, configuration, projector types.

Pure functions, both directions. Names of weights here are those that transformers writes to disk
(`language_model.model.X`, `vision_tower.X`, `multi_modal_projector.linear_1.X`); the original's are `model.X`,
`model.vision_tower.vision_tower.vision_model.X` and `model.mm_projector.0.X`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlavaConfig

from lift.common.errors import UserError
from lmm.tensor_files import Tensors

MODEL_TYPES = ("llava_llama", "llava")
PROJECTOR_ACTIVATIONS = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""The original's `mm_projector_type` and transformers' `projector_hidden_act`; a linear one is two layers without activation."""
FEATURE_STRATEGIES = {"patch": "default", "cls_patch": "full"}
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Constants that older versions saved beside the weights."""
PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower."
ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."
_TO_TRANSFORMERS = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", TOWER),
    (r"^model\.mm_projector\.0\.", PROJECTOR + "linear_1."),
    (r"^model\.mm_projector\.2\.", PROJECTOR + "linear_2."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model."),
)
_ON_DISK = (
    (r"^model\.(?=(vision_tower|multi_modal_projector|language_model)\.)", ""),
    (r"^vision_tower\.vision_model\.", TOWER),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
_TO_ORIGINAL = (
    (r"^vision_tower\.", ORIGINAL_TOWER),
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model."),
)


def to_transformers(key: str) -> str | None:
    """The name on disk under transformers 5 of a weight of the original; None for a weight that it does not have."""
    return _renamed(key, _TO_TRANSFORMERS)


def to_original(key: str) -> str | None:
    """The original's name of a weight named as on disk."""
    return _renamed(key, _TO_ORIGINAL)


def on_disk(key: str) -> str:
    """The name on disk of a weight named by any version of transformers, in memory or on disk."""
    for pattern, start in _ON_DISK:
        key = re.sub(pattern, start, key)
    return key


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, start in rules:
        if re.match(pattern, key):
            return re.sub(pattern, start, key)
    return None


def projector_to_transformers(tensors: Tensors, kind: str, source: Path) -> Tensors:
    """The projector among `tensors` by transformers' names; keys may have any prefix before `mm_projector.`.

    A linear projector W x + b becomes a first layer (W, b) and a second that is the identity: transformers has two layers.

    Raises:
        UserError: weights of the projector are missing or do not belong to `kind`.
    """
    found = {key.rpartition("mm_projector.")[2]: value for key, value in tensors.items() if "mm_projector." in key}
    names = ["weight", "bias"] if kind == "linear" else ["0.weight", "0.bias", "2.weight", "2.bias"]
    if sorted(found) != sorted(names):
        raise UserError(
            f"{source}: expected the weights mm_projector.{{{', '.join(names)}}} of a projector of type {kind}, found "
            f"{', '.join(sorted(found)) or 'none'}. Take the folder or mm_projector.bin that the original's training wrote."
        )
    if kind == "linear":
        width, dtype = found["weight"].shape[0], found["weight"].dtype
        found = {"0.weight": found["weight"], "0.bias": found["bias"]}
        found |= {"2.weight": torch.eye(width, dtype=dtype), "2.bias": torch.zeros(width, dtype=dtype)}
    layers = {"0": "linear_1", "2": "linear_2"}
    return {f"{PROJECTOR}{layers[name[0]]}{name[1:]}": value for name, value in found.items()}


def projector_to_original(tensors: Tensors, kind: str) -> Tensors:
    """The projector among `tensors` (named as on disk) by the original's names; the two layers of a linear one become one."""
    layers = {key: value for key, value in tensors.items() if key.startswith(PROJECTOR)}
    if kind != "linear":
        return {to_original(key) or key: value for key, value in layers.items()}
    (first, first_bias), (second, second_bias) = (
        (layers[f"{PROJECTOR}{layer}.weight"].double(), layers[f"{PROJECTOR}{layer}.bias"].double())
        for layer in ("linear_1", "linear_2")
    )
    dtype = layers[f"{PROJECTOR}linear_1.weight"].dtype
    joined = {"weight": second @ first, "bias": second @ first_bias + second_bias}
    return {f"model.mm_projector.{name}": value.to(dtype) for name, value in joined.items()}


def check_original(config: Any, source: Path) -> None:
    """Raises UserError when `config` is not that of a LLaVA-1.5-like checkpoint of the original code."""
    if not isinstance(config, dict) or not any(key.startswith("mm_") for key in config):
        hint = " It is one of transformers already; use it as it is." if "vision_config" in config else ""
        raise UserError(f"{source}: expected the config.json of an original LLaVA checkpoint (keys mm_*), found none.{hint}")
    wanted: dict[str, tuple[Any, ...]] = {
        "model_type": MODEL_TYPES,
        "mm_projector_type": tuple(PROJECTOR_ACTIVATIONS),
        "mm_vision_select_feature": tuple(FEATURE_STRATEGIES),
        "mm_use_im_start_end": (False,),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_patch_merge_type": ("flat",),
    }
    usual = {"mm_projector_type": "linear", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
    for key, known in wanted.items():
        found = config.get(key, usual.get(key, "flat" if key == "mm_patch_merge_type" else None))
        if found not in known:
            names = ", ".join(map(repr, known))
            raise UserError(f"{source}: {key}: expected {names}, found {found!r}. This is another model than LLaVA-1.5's.")
    if not isinstance(config.get("mm_vision_select_layer"), int):
        raise UserError(f"{source}: mm_vision_select_layer: expected a whole number, such as -2.")


def config_to_transformers(original: dict[str, Any], vision: Any, image_id: int) -> LlavaConfig:
    """LlavaConfig of the original's config.json; `vision` is the tower's own configuration."""
    fields = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling", "dtype"}
    fields -= {"model_type", "architectures", "transformers_version", "rope_parameters"}
    text = LlamaConfig(**{key: value for key, value in original.items() if key in fields})
    strategy = FEATURE_STRATEGIES[original.get("mm_vision_select_feature", "patch")]
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=patches + (strategy == "full"),
        projector_hidden_act=PROJECTOR_ACTIVATIONS[original.get("mm_projector_type", "linear")],
        vision_feature_layer=original["mm_vision_select_layer"],
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def projector_kind(config: LlavaConfig, folder: Path) -> str:
    """The original's `mm_projector_type`. Raises UserError for a projector that the original does not have."""
    for kind, activation in PROJECTOR_ACTIVATIONS.items():
        if config.projector_hidden_act == activation and config.multimodal_projector_bias:
            return kind
    raise UserError(
        f"{folder}/config.json: projector_hidden_act: expected gelu or linear, with biases, found "
        f"{config.projector_hidden_act!r}. The original LLaVA has no such projector."
    )


def config_to_original(config: LlavaConfig, tower: str, pads: bool, max_length: int, folder: Path) -> dict[str, Any]:
    """The original's config.json.

    Args:
        tower: what to write as `mm_vision_tower`.
        pads: images are padded to a square.
        max_length: `tokenizer_model_max_length`, beyond which the original cuts a sample, images included.
    Raises:
        UserError: parts that the original, or transformers 4.37 under it, does not have.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    _check_parts(config, text, vision, folder)
    rope = dict(text.rope_parameters)
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    keys = (
        "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range",
        "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "pad_token_id", "rms_norm_eps", "use_cache", "vocab_size",
    )  # fmt: skip
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{key: getattr(text, key) for key in keys},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "transformers_version": "4.37.2",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad" if pads else None,
        "mm_hidden_size": vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": projector_kind(config, folder),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": {v: k for k, v in FEATURE_STRATEGIES.items()}[config.vision_feature_select_strategy],
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "tokenizer_model_max_length": max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


def _check_parts(config: LlavaConfig, text: Any, vision: Any, folder: Path) -> None:
    heads = text.hidden_size // text.num_attention_heads
    for what, found, known in (
        ("text_config.model_type", text.model_type, ("llama",)),
        ("text_config.mlp_bias", getattr(text, "mlp_bias", False), (False,)),
        ("text_config.head_dim", getattr(text, "head_dim", None) or heads, (heads,)),
        ("text_config.rope_parameters.rope_type", dict(text.rope_parameters or {}).get("rope_type"), ("default", "linear", "dynamic")),
        ("vision_config.model_type", vision.model_type, ("clip_vision_model",)),
        ("vision_feature_layer", type(config.vision_feature_layer).__name__, ("int",)),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, tuple(FEATURE_STRATEGIES.values())),
    ):  # fmt: skip
        if found not in known:
            raise UserError(
                f"{folder}/config.json: {what}: the original LLaVA knows {' or '.join(map(repr, known))}, found {found!r}. "
                "Such a model can only be used with transformers."
            )
