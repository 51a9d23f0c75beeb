"""A CLIP, SigLIP or SigLIP 2 model of transformers, from a folder or from the hub.

`model_type` in config.json decides which; the image processor and the tokenizer are the folder's own.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Siglip2Model, SiglipModel

from eval.encoders.dual import LOADING_ERRORS, DualEncoder, default_device, hash_tensors, is_text_weight, reason
from lift.common.errors import UserError
from lift.common.files import read_json, sha256_file
from lift.encoder import load_checked


class Family(NamedTuple):
    """What differs between the model types."""

    model_class: Any
    pads_to_context: bool
    """SigLIP's text feature is taken at the last position, and it was trained on texts padded to the context length without a
    mask; CLIP's is taken at the end token."""
    is_patched: bool
    """SigLIP 2 (NaFlex) takes patches of an image in its own aspect ratio."""


MODELS = {
    "clip": Family(CLIPModel, pads_to_context=False, is_patched=False),
    "siglip": Family(SiglipModel, pads_to_context=True, is_patched=False),
    "siglip2": Family(Siglip2Model, pads_to_context=True, is_patched=True),
}
VISION = ("vision_model.", "visual_projection.")
CONFIG = ("config.json", "processor_config.json")
PREPROCESSING = ("preprocessor_config.json",)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
OLD_CLIP_END = 2
"""`eos_token_id` of CLIP's early configurations, with which transformers takes the feature at the largest id."""


class TransformersEncoder(DualEncoder):
    """Features as `get_image_features` and `get_text_features` give them, in float32.

    Raises:
        UserError: see `open_encoder`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.device = folder, name, default_device()
        config = read_json(folder / "config.json", "the configuration of a model")
        if config.get("model_type") not in MODELS:
            raise UserError(f"{name}: expected model_type {', '.join(sorted(MODELS))}, found {config.get('model_type')!r}.")
        self.family = MODELS[config["model_type"]]
        self.model = load_checked(self.family.model_class, folder).eval().to(self.device)
        size = getattr(self.model.config.vision_config, "image_size", None)
        self.image_size = size if isinstance(size, int) and not self.family.is_patched else None
        self.context_length = int(self.model.config.text_config.max_position_embeddings)
        try:
            # torchvision's backend, the default, is off by up to a grey level from what the models were trained with
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self._check_tokenizer()
            self._check_dimensions()
        except LOADING_ERRORS as error:
            raise UserError(
                f"{folder}: its image processor, tokenizer and model do not work together: {reason(error)}. The folder needs "
                "preprocessor_config.json and the tokenizer's files of this very model."
            ) from error

    @cached_property
    def content_hash(self) -> str:  # type: ignore[override]
        return hash_tensors(self.model.state_dict(), self._files(*CONFIG, *PREPROCESSING, *TOKENIZER))

    @cached_property
    def text_hash(self) -> str:  # type: ignore[override]
        text = {name: tensor for name, tensor in self.model.state_dict().items() if is_text_weight(name, VISION)}
        return hash_tensors(text, self._files(*CONFIG, *TOKENIZER))

    def _files(self, *names: str) -> dict[str, str]:
        return {name: sha256_file(self.folder / name) for name in names if (self.folder / name).is_file()}

    def _check_tokenizer(self) -> None:
        rows = self.model.config.text_config.vocab_size
        if len(self.tokenizer) > rows:
            raise UserError(
                f"{self.folder}: its tokenizer has {len(self.tokenizer)} tokens, its text tower {rows}. Put the tokenizer that "
                "belongs to this model there."
            )
        end = self.model.config.text_config.eos_token_id
        if not self.family.pads_to_context and end not in (OLD_CLIP_END, self.tokenizer.eos_token_id):
            # transformers would take the feature of every text at its first token
            raise UserError(
                f"{self.folder}: its text feature is taken at the token {end} (text_config.eos_token_id), but its tokenizer "
                f"ends texts with {self.tokenizer.eos_token_id}. Put the tokenizer that belongs to this model there."
            )

    def _own_pixels(self, image: Image.Image) -> Tensor:
        made = self.processor(images=image, return_tensors="pt")
        if not self.family.is_patched:
            return made["pixel_values"][0]
        return _packed(made["pixel_values"][0], made["spatial_shapes"][0])

    def _embed_images(self, pixel_values_B3HW: Tensor) -> Tensor:
        if not self.family.is_patched:
            return self.model.get_image_features(pixel_values=pixel_values_B3HW).pooler_output
        patches_BPF, shapes_B2 = _unpacked(pixel_values_B3HW)
        mask_BP = torch.arange(patches_BPF.shape[1], device=shapes_B2.device) < shapes_B2.prod(-1, keepdim=True)
        return self.model.get_image_features(
            pixel_values=patches_BPF, pixel_attention_mask=mask_BP, spatial_shapes=shapes_B2
        ).pooler_output

    def _embed_texts(self, texts: list[str]) -> Tensor:
        padding = "max_length" if self.family.pads_to_context else "longest"
        batch = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=self.context_length, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        if self.family.pads_to_context:
            return self.model.get_text_features(input_ids=batch["input_ids"]).pooler_output
        return self.model.get_text_features(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).pooler_output  # fmt: skip


def downloaded(name: str) -> Path:
    """The snapshot of a hub name, fetched when it is not on this machine and the hub can be reached; safetensors before .bin.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    small = [*CONFIG, *PREPROCESSING, *TOKENIZER]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "*.index.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "*.index.json", "*.bin"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such folder, and no model of that name can be fetched: {reason(error)}") from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: has no config.json; a model of open_clip is opened by open_clip:hf-hub:{name}.")
    return folder


def _packed(patches_PF: Tensor, shape_2: Tensor) -> Tensor:
    """[3, P + 1, F / 3] of P patches of F values: all that SigLIP 2 wants to know of an image in one tensor that stacks.

    The first row begins with the numbers of patches down and across; the rest of it is 0.
    """
    values_3PV = patches_PF.unflatten(-1, (3, -1)).transpose(0, 1)
    first_31V = values_3PV.new_zeros(3, 1, values_3PV.shape[-1])
    first_31V[0, 0, :2] = shape_2
    return torch.cat([first_31V, values_3PV], dim=1)


def _unpacked(packed_B3PV: Tensor) -> tuple[Tensor, Tensor]:
    """[B, P, F] and int64 [B, 2]."""
    return packed_B3PV[:, :, 1:].transpose(1, 2).flatten(-2), packed_B3PV[:, 0, 0, :2].long()
