"""Model folders on disk: what identifies their content, and whether transformers finds every weight in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lift.common.errors import UserError, first_line
from lift.common.files import sha256_bytes, sha256_file, sha256_text

# What decides how a model behaves; records of how it came to be do not.
CONTENT = ("*.safetensors", "*config.json", "*.jinja", "tokenizer*", "special_tokens_map.json")


def content_hash(folder: Path) -> str:
    """Hash of the weights, configuration, tokenizer and preprocessing of a model folder.

    Raises:
        UserError: the folder has no weights in safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: expected a model folder with *.safetensors, found none. Check the path.")
    files = sorted({file for pattern in CONTENT for file in folder.glob(pattern)})
    return sha256_text("\n".join(f"{file.name} {sha256_file(file)}" for file in files))


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is not whole: {error}. Write the model folder again.") from error


def tower_hash(folder: Path) -> str:
    """Hash of a LLaVA folder's vision tower alone: names, formats, shapes and bytes of its weights.

    The same for every folder that holds the same tower, whatever the language model beside it.
    """
    lines = []
    for file in sorted(folder.glob("*.safetensors")):
        with _opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118  # not a dict
                if "vision_tower." in key:
                    value = weights.get_tensor(key)
                    content = sha256_bytes(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                    name = key.rpartition("vision_tower.")[2].removeprefix("vision_model.")
                    lines.append(f"{name} {value.dtype} {list(value.shape)} {content}")
    return sha256_text("\n".join(sorted(lines)))


def check_fits(folder: Path, config: Any) -> None:
    """Raises UserError when the projector fits not the tower's or the language model's hidden size in `config`."""
    text, vision = config.text_config.hidden_size, config.vision_config.hidden_size
    expected = {"linear_1.weight": (text, vision), "linear_2.weight": (text, text)}
    for file in sorted(folder.glob("*.safetensors")):
        with _opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                name = key.rpartition("multi_modal_projector.")[2]
                shape = tuple(weights.get_slice(key).get_shape()) if "multi_modal_projector." in key else None
                if shape and shape != expected.get(name, shape):
                    raise UserError(
                        f"{file}: the projector's {name} is {shape[0]} x {shape[1]}, but config.json has a vision tower of "
                        f"hidden size {vision} and a language model of {text}. Build the model anew with this tower: lmm build."
                    )


def context_length(language_model: Any) -> int:
    """Positions that a language model of this configuration has, those that its rotary embedding is stretched by included.

    2^31 where the configuration names no bound.
    """
    positions: int = getattr(language_model, "max_position_embeddings", None) or 2**31
    rotary = getattr(language_model, "rope_parameters", None) or {}
    by_layer = [value for value in rotary.values() if isinstance(value, dict)]  # one for each kind of attention
    stretched = [values for values in [rotary, *by_layer] if values.get("rope_type") in ("linear", "dynamic", "yarn")]
    return int(positions * max([1.0, *(float(values.get("factor") or 1) for values in stretched)]))


def load_weights(folder: Path, left_over: bool = False, **keywords: Any) -> Any:
    """A LlavaForConditionalGeneration with every weight from `folder`; transformers alone would only warn of random ones.

    Args:
        left_over: weights that the model has no place for are allowed.
        keywords: further ones of `from_pretrained`.
    Raises:
        UserError: it cannot be loaded, or a weight is missing, left over or misshapen.
    """
    from transformers import LlavaForConditionalGeneration

    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **keywords,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *([] if left_over else info["unexpected_keys"])]
    if wrong:
        keys = ", ".join(sorted(map(str, wrong))[:3])
        raise UserError(
            f"{folder}: expected the weights of a LLaVA model, none random; missing, unknown or misshapen are {keys}."
        )
    return model


def check_loads(folder: Path) -> None:
    """Loads the finished model as a user would. Raises RuntimeError when a weight is missing, left over or misshapen."""
    from transformers import LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    info = loaded[1]
    if any(info.values()):
        raise RuntimeError(f"{folder}: the written model does not load whole: {info}")
