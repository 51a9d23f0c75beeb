"""The official LIFT code's formats: its checkpoints (read, and written back) and the preprocessing of its evaluation scripts.

A checkpoint's tensors come in under the official names and go out under ours (`vision.*`, `head.*`, `log_scale`, and for the
CLIP baseline `text_tower.*`), or the other way round; one table serves both directions.

Two preprocessings meet here. The official *training* normalises with OpenAI CLIP's mean and deviation, as the image processor
of every encoder folder does. The official *evaluation scripts* resize to 256 pixels, crop 224 and normalise with *ImageNet's*
mean and deviation, so that published numbers come from pixels that the encoder was not trained on.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from lift.common.errors import UserError
from lift.common.files import atomic_file, require_file
from lift.images import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EVALUATION_RESIZE, EVALUATION_CROP = 256, 224

PREPROCESSING = {
    "training": {
        "crop": "random resized crop, bicubic",
        "mean": list(OPENAI_CLIP_MEAN),
        "std": list(OPENAI_CLIP_STD),
        "note": "OpenAI CLIP's values; preprocessor_config.json (protocol standard) has the same",
    },
    "official_evaluation": {
        "crop": f"shorter side to {EVALUATION_RESIZE}, bicubic, centre crop {EVALUATION_CROP}",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "note": "ImageNet's values, which the official evaluation scripts use although training did not (protocol official)",
    },
}
"""Written into `lift_config.json`, so that a reader of the folder knows which values belong to what."""

_HEAD, _OLD_HEAD = "mlp_projector.", "text_decoder."
_NOT_NEEDED = ("logit_bias", "attn_mask")
"""Known tensors that no embedding depends on: the sigmoid loss's bias, and the causal mask that older files store."""

NOT_WEIGHTS = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What torch's restricted unpickler and safetensors raise on files that are damaged or of another kind."""


def official_evaluation_pixels(image: Image.Image) -> Tensor:
    """float32 [3, 224, 224] as the official evaluation scripts make it: bicubic resize to 256 (PIL), centre crop, ImageNet."""
    resized = transforms.resize(image.convert("RGB"), [EVALUATION_RESIZE], InterpolationMode.BICUBIC)
    cropped = transforms.center_crop(resized, [EVALUATION_CROP, EVALUATION_CROP])
    return transforms.normalize(transforms.to_tensor(cropped), list(IMAGENET_MEAN), list(IMAGENET_STD))


def require_official_size(name: str, image_size: int | None) -> None:
    """Raises UserError for an encoder `name` that does not see what `official_evaluation_pixels` gives.

    Args:
        image_size: pixels of a side, None for another shape than a square or for none that is fixed.
    """
    if image_size != EVALUATION_CROP:
        raise UserError(
            f"{name}: the official evaluation protocol crops {EVALUATION_CROP} pixels, but this encoder sees "
            f"{image_size or 'other shapes'}. Use --protocol standard."
        )


@dataclass(frozen=True)
class Checkpoint:
    """An official checkpoint's weights, float32, under the names of the official model without the `module.` prefix."""

    state: dict[str, Tensor]
    name: str | None
    epoch: int | None


class Entry(NamedTuple):
    """One tensor of the official model and ours that hold the same numbers."""

    official: str
    ours: tuple[str, ...]
    """Three names for the stacked query, key and value."""
    transposed: bool = False
    """Official projections are [in, out] matrices, ours are `nn.Linear` weights."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a training checkpoint, a bare state dict (`torch.save`), or safetensors; pickled code is never run.

    Raises:
        UserError: not such a file, holds objects other than plain data, or a tensor that is not finite floating point.
    """
    require_file(path, "an official checkpoint (epoch_N.pt, a state dict or safetensors)")
    loaded = _load(path)
    whole = loaded if isinstance(loaded, dict) else {}
    state = whole.get("state_dict", whole)
    entries = state.items() if isinstance(state, dict) else []
    if not entries or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        raise UserError(f"{path}: expected a state dict of tensors, or one under the key 'state_dict', found neither.")
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = name.removeprefix("module.")
        if short.startswith(_OLD_HEAD):
            short = _HEAD + short.removeprefix(_OLD_HEAD)
        if short in named:
            raise UserError(
                f"{path}: '{name}' occurs twice, once under another name; expected one tensor. The file is damaged."
            )
        named[short] = tensor.detach()
    for name, tensor in named.items():
        if name not in _NOT_NEEDED and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f"{path}: '{name}' is not finite floating point ({tensor.dtype}). The checkpoint cannot be used.")
    epoch, label = whole.get("epoch"), whole.get("name")
    return Checkpoint(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in named.items()},
        label if isinstance(label, str) else None,
        epoch if isinstance(epoch, int) else None,
    )


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The optimizer's learning rate is a numpy.float64, which numpy 1 and 2 pickle under different module names.
        scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
        names = ["numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"]
        allowed: list[Any] = [*[(scalar, name) for name in names], np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except NOT_WEIGHTS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        why = next((line for line in lines if "global" in line.lower()), lines[0])
        raise UserError(
            f"{path}: cannot be read as plain weights (torch.save, or .safetensors); anything else is not loaded, since it "
            f"could run code. {type(error).__name__}: {why}"
        ) from error


def is_clip(official: Mapping[str, Tensor], path: Path) -> bool:
    """Tells LIFT (a head over pooled patches) from the CLIP baseline (two towers). Raises UserError when it is neither."""
    if any(name.startswith(_HEAD) for name in official):
        return False
    if {"visual.proj", "text_projection", "token_embedding.weight"} <= official.keys():
        return True
    raise UserError(
        f"{path}: expected an official LIFT model (visual.*, {_HEAD}projector.*) or its CLIP baseline (visual.proj, "
        f"text_projection, token_embedding.weight), found {', '.join(sorted(official)[:5])}, ..."
    )


def table(clip: bool, layers: int, text_layers: int = 0) -> list[Entry]:
    """Every tensor of the official LIFT, or of its CLIP baseline, in the official order."""
    vision = "vision.embeddings."
    entries = [
        Entry("logit_scale", ("log_scale",)),
        Entry("visual.class_embedding", (vision + "class_embedding",)),
        Entry("visual.positional_embedding", (vision + "position_embedding.weight",)),
        Entry("visual.conv1.weight", (vision + "patch_embedding.weight",)),
        *_affine("visual.ln_pre", "vision.pre_layrnorm"),
        *_blocks("visual.transformer.", "vision.encoder.", layers),
        *_affine("visual.ln_post", "vision.post_layernorm"),
    ]
    if not clip:
        return entries + [entry for i in (0, 2) for entry in _affine(f"{_HEAD}projector.{i}", f"head.{i}")]
    text = "text_tower.text_model."
    return [
        Entry("positional_embedding", (text + "embeddings.position_embedding.weight",)),
        Entry("text_projection", ("text_tower.text_projection.weight",), transposed=True),
        *entries,
        Entry("visual.proj", ("head.weight",), transposed=True),
        *_blocks("transformer.", text + "encoder.", text_layers),
        Entry("token_embedding.weight", (text + "embeddings.token_embedding.weight",)),
        *_affine("ln_final", text + "final_layer_norm"),
    ]


def _affine(official: str, ours: str) -> list[Entry]:
    return [Entry(f"{official}.{kind}", (f"{ours}.{kind}",)) for kind in ("weight", "bias")]


def _blocks(official: str, ours: str, layers: int) -> list[Entry]:
    entries = []
    for layer in range(layers):
        theirs, mine = f"{official}resblocks.{layer}.", f"{ours}layers.{layer}."
        entries += _affine(theirs + "ln_1", mine + "layer_norm1")
        for kind in ("weight", "bias"):
            parts = tuple(f"{mine}self_attn.{part}_proj.{kind}" for part in "qkv")
            entries.append(Entry(f"{theirs}attn.in_proj_{kind}", parts))
        entries += _affine(theirs + "attn.out_proj", mine + "self_attn.out_proj")
        entries += _affine(theirs + "ln_2", mine + "layer_norm2")
        entries += _affine(theirs + "mlp.c_fc", mine + "mlp.fc1")
        entries += _affine(theirs + "mlp.c_proj", mine + "mlp.fc2")
    return entries


def count_layers(names: Mapping[str, Any], prefix: str) -> int:
    """Number of different `PREFIX<number>.` among the names."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


@dataclass(frozen=True)
class Architecture:
    """What the shapes of an official checkpoint say. Sizes in pixels or features."""

    clip: bool
    patch_size: int
    image_size: int
    width: int
    layers: int
    intermediate_size: int
    embedding_dim: int
    text: dict[str, int] | None
    """CLIP only: vocabulary, context_length, width, layers, intermediate_size."""


def read_architecture(official: Mapping[str, Tensor], path: Path) -> Architecture:
    """Checks the names, then reads the sizes; attention heads cannot be told from shapes.

    Raises:
        UserError: names a tensor that is missing, unknown, or whose shape does not fit the others.
    """
    clip = is_clip(official, path)
    layers = max(1, count_layers(official, "visual.transformer.resblocks."))  # with none, the first one is what is missing
    text_layers = max(1, count_layers(official, "transformer.resblocks.")) if clip else 0
    wanted = {entry.official for entry in table(clip, layers, text_layers)}
    if not clip:
        wanted.discard("logit_scale")  # the cosine loss has none
    kind = "CLIP baseline" if clip else "LIFT model"
    missing = sorted(wanted - official.keys())
    if missing:
        raise UserError(f"{path}: not a whole {kind}: {len(missing)} tensors are missing, the first is '{missing[0]}'.")
    unknown = sorted(official.keys() - wanted - {"logit_scale", *_NOT_NEEDED})
    if unknown:
        raise UserError(
            f"{path}: '{unknown[0]}' ({len(unknown)} such tensors) is no part of the official {kind}; dropping it would change "
            "the embeddings. Only the published architecture can be imported."
        )
    conv, positions = official["visual.conv1.weight"], official["visual.positional_embedding"]
    if conv.ndim != 4 or conv.shape[1] != 3 or conv.shape[2] != conv.shape[3] or positions.ndim != 2:
        raise UserError(
            f"{path}: expected 'visual.conv1.weight' [width, 3, patch, patch] and 'visual.positional_embedding' [tokens, "
            f"width], found {list(conv.shape)} and {list(positions.shape)}."
        )
    grid = math.isqrt(len(positions) - 1)
    if grid < 1 or grid**2 != len(positions) - 1:
        raise UserError(
            f"{path}: 'visual.positional_embedding' has {len(positions)} rows; expected a class token and a square of patches."
        )
    text = None
    if clip:
        text = {
            "vocabulary": len(official["token_embedding.weight"]),
            "context_length": len(official["positional_embedding"]),
            "width": int(official["positional_embedding"].shape[-1]),
            "layers": text_layers,
            "intermediate_size": len(official["transformer.resblocks.0.mlp.c_fc.weight"]),
        }
    return Architecture(
        clip=clip,
        patch_size=int(conv.shape[2]),
        image_size=grid * int(conv.shape[2]),
        width=int(conv.shape[0]),
        layers=layers,
        intermediate_size=len(official["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        embedding_dim=int(official["visual.proj"].shape[-1]) if clip else len(official[f"{_HEAD}projector.2.bias"]),
        text=text,
    )


def from_official(
    official: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Official tensors to ours, and the names of known tensors that were left out.

    Args:
        expected: the state dict of our model of this architecture, for its shapes (it may be on the meta device).
    Raises:
        UserError: names a tensor of another shape than the architecture has.
    """
    clip = is_clip(official, path)
    layers = count_layers(official, "visual.transformer.resblocks.")
    state: dict[str, Tensor] = {}
    for entry in table(clip, layers, count_layers(official, "transformer.resblocks.")):
        if entry.official not in official:
            continue
        tensor = official[entry.official]
        tensor = tensor.T if entry.transposed else tensor.reshape(1) if entry.official == "logit_scale" else tensor
        parts = tensor.chunk(len(entry.ours))
        for name, part in zip(entry.ours, parts, strict=False):
            if len(parts) != len(entry.ours) or part.shape != expected[name].shape:
                raise UserError(
                    f"{path}: '{entry.official}' has shape {list(official[entry.official].shape)}, which does not fit the "
                    f"other tensors ({name} would be {list(expected[name].shape)}). The checkpoint is damaged."
                )
            state[name] = part.contiguous()
    return state, [name for name in _NOT_NEEDED if name in official]


def to_official(state: Mapping[str, Tensor], clip: bool, folder: Path) -> dict[str, Tensor]:
    """Our tensors to the official ones, under their names with the `module.` prefix; the inverse of `from_official`.

    Raises:
        UserError: a tensor that the official model has no place for (the text transform).
    """
    layers = count_layers(state, "vision.encoder.layers.")
    entries = table(clip, layers, count_layers(state, "text_tower.text_model.encoder.layers."))
    left = sorted(state.keys() - {name for entry in entries for name in entry.ours})
    if left:
        raise UserError(f"{folder}: the official model has no place for '{left[0]}'. Export it with --format folder.")
    official: dict[str, Tensor] = {}
    for entry in entries:
        if not all(name in state for name in entry.ours):
            continue
        tensor = torch.cat([state[name] for name in entry.ours])
        tensor = tensor.T if entry.transposed else tensor.reshape(()) if entry.official == "logit_scale" else tensor
        official[f"module.{entry.official}"] = tensor.float().contiguous().clone()
    return official


def write_checkpoint(path: Path, state: dict[str, Tensor], name: str, epoch: int) -> None:
    """Writes the file that the official evaluation reads; there is no optimizer state, so it does not resume training."""
    with atomic_file(path) as temporary:
        torch.save({"epoch": epoch, "name": name, "state_dict": state}, temporary)
