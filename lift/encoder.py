"""An encoder folder, loaded for evaluation: images and texts in, L2-normalised float32 features of one space out.

Folders written by `lift export` and `lift import` are alike here; one that was imported without its text encoder embeds images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPTextModelWithProjection, CLIPVisionModel

from lift.common.errors import UserError
from lift.common.files import read_json, require_folder, sha256_folder, sha256_text
from lift.images import evaluation_transform
from lift.model import class_token_feature, lift_head, mean_patch_feature
from lift.official import NOT_WEIGHTS, official_evaluation_pixels, require_official_size
from lift.onednn import use_onednn
from lift.settings import TextEncoderSettings
from lift.text_encoders import describe_text_encoder, load_text_encoder
from lift.text_side import TrainedTextSide
from lift.transforms import TextTransform

CARD = "README.md"
"""The model card of an encoder folder; no part of what its content hash stands for."""


class Encoder:
    """Image and text features of an exported encoder folder, LIFT or CLIP."""

    def __init__(self, folder: Path) -> None:
        self.folder = require_folder(folder, "an encoder folder (lift export)")
        self.config = read_json(folder / "lift_config.json", "the description of an encoder folder (lift export)")
        self.is_clip = self.config["objective"] == "clip"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = CLIPImageProcessorPil.from_pretrained(folder)
        self._evaluation_pixels = evaluation_transform(self.processor)
        self.vision = load_checked(CLIPVisionModel, folder).eval().to(self.device)
        weights = load_file(folder / "lift_head.safetensors")
        width, dimension = self.vision.config.hidden_size, self.embedding_dim
        self.head: nn.Module = (
            nn.Linear(width, dimension, bias=False)
            if self.is_clip
            else lift_head(width, weights["head.0.weight"].shape[0], dimension)
        )
        _load_prefixed(self.head, weights, "head.")
        self.head.eval().to(self.device)
        if not self.is_clip:
            raw_dimension = weights["text_transform.mean_D"].shape[0] if "text_transform.mean_D" in weights else dimension
            self.text_transform = TextTransform(self.config["text_transform"], raw_dimension, dimension)
            _load_prefixed(self.text_transform, weights, "text_transform.")
        use_onednn(self.vision)
        use_onednn(self.head)

    @property
    def embedding_dim(self) -> int:
        return int(self.config["embedding_dim"])

    @property
    def name(self) -> str:
        """The folder's own; of the folder `encoder` that a run leaves, the run's."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "encoder" and (folder.parent / "config.yaml").is_file() else folder.name

    @property
    def has_frozen_text(self) -> bool:
        """Whether texts come from a frozen language model (LIFT) and not from a tower trained with the images (CLIP)."""
        return not self.is_clip

    @cached_property
    def content_hash(self) -> str:
        return encoder_hash(self.folder)

    @cached_property
    def text_hash(self) -> str:
        """Hash of everything that `text_embeddings` depend on: the frozen text encoder, wherever it lies, or CLIP's text tower.

        A LIFT encoder whose folder states its text encoder's revision needs no text encoder on this machine for it.

        Raises:
            UserError: as `text_embeddings`, for an encoder that was imported without its text side.
        """
        if self.is_clip:
            return sha256_folder(self._text_tower_folder)
        described = self.config["text"]
        if described["revision"] is None:
            described = describe_text_encoder(self._text_settings)
        return sha256_text(json.dumps({name: value for name, value in described.items() if name != "path"}, sort_keys=True))

    def pixel_values(self, image: Image.Image, protocol: Literal["standard", "official"] = "standard") -> Tensor:
        """float32 [3, H, W] of an image of any mode.

        Args:
            protocol: standard is the folder's own image processor, official is what the official evaluation scripts do, with
                ImageNet's mean and deviation (see `lift.official`).
        Raises:
            UserError: the official protocol for an encoder that does not see 224 pixels.
        """
        if protocol == "standard":
            return self._evaluation_pixels(image.convert("RGB"))
        require_official_size(str(self.folder), self.vision.config.image_size)
        return official_evaluation_pixels(image)

    @torch.inference_mode()
    def image_embeddings(self, pixel_values_B3HW: Tensor) -> Tensor:
        """float32 [B, D] on the encoder's device, as the head gives them, not normalised."""
        feature = class_token_feature if self.is_clip else mean_patch_feature
        return self.head(feature(self.vision, pixel_values_B3HW.to(self.device)))

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 64, progress: str | None = None) -> np.ndarray:
        """float32 [N, D], L2-normalised, in the order given; images of any mode are converted to RGB."""
        out = np.empty((len(images), self.embedding_dim), np.float32)
        for start in tqdm(range(0, len(images), batch_size), desc=progress, disable=progress is None, leave=False):
            pixels_B3HW = torch.stack([self.pixel_values(image) for image in images[start : start + batch_size]])
            features_BD = F.normalize(self.image_embeddings(pixels_B3HW), dim=-1)
            out[start : start + len(features_BD)] = features_BD.cpu().numpy()
        return out

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """float32 [N, D], L2-normalised, in the order given.

        Raises:
            UserError: as `text_embeddings`.
        """
        aligned_ND = self.align(self.text_embeddings(texts, batch_size))
        return F.normalize(torch.from_numpy(aligned_ND), dim=-1).numpy()

    @torch.inference_mode()
    def text_embeddings(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """float32 [N, T] as the text encoder gives them, before `align`; in the order given, not normalised.

        Args:
            batch_size: texts in one forward pass of CLIP's text tower; a frozen text encoder cuts its own batches, by tokens.
        Raises:
            UserError: the text encoder that a LIFT encoder was aligned to is not where it was, has changed, or was not given
                when the encoder was imported.
        """
        if not self.is_clip:
            return self._text_encoder.encode(list(texts))
        tower, side = self._text_tower
        batches = []
        for start in range(0, len(texts), batch_size):
            batch = side.tokenise(list(texts[start : start + batch_size]))
            tokens = {name: tensor.to(self.device) for name, tensor in batch.items()}
            batches.append(tower(**tokens).text_embeds.cpu().numpy())
        return np.concatenate(batches) if batches else np.empty((0, self.embedding_dim), np.float32)

    @torch.inference_mode()
    def align(self, text_NT: np.ndarray) -> np.ndarray:
        """float32 [N, D] in the space of the images from what `text_embeddings` gives: the text transform for LIFT.

        Not normalised.

        Raises:
            UserError: `text_NT` has another width than the encoder was aligned to.
        """
        expected = self.embedding_dim if self.is_clip else self.text_transform.dimension
        if text_NT.ndim != 2 or text_NT.shape[1] != expected:
            raise UserError(
                f"{self.folder}: expected text embeddings of {expected} dimensions, found an array of shape "
                f"{list(text_NT.shape)}. Embed the texts with the text encoder that it was aligned to."
            )
        if self.is_clip:
            return text_NT
        return self.text_transform.unnormalised(torch.from_numpy(text_NT)).numpy()

    @property
    def _text_settings(self) -> TextEncoderSettings:
        text = self.config["text"]
        if text["path"] is None and text["revision"] is None:
            raise UserError(
                f"{self.folder}: was imported without its text encoder, so that it embeds images only. Import it again with "
                "--text_encoder.kind, --text_encoder.path and --text_encoder.max_length; the published LIFT checkpoints were "
                "aligned to NV-Embed-v2 with max_length 77 (short captions) or 323 (long ones)."
            )
        known = {field.name for field in fields(TextEncoderSettings)}
        return TextEncoderSettings(**{name: value for name, value in text.items() if name in known})

    @cached_property
    def _text_encoder(self) -> Any:
        text, settings = self.config["text"], self._text_settings
        found = describe_text_encoder(settings)["revision"]
        if text["revision"] is not None and found != text["revision"]:
            raise UserError(
                f"{self.folder}: was aligned to the text encoder {text['path'] or text['kind']} with revision "
                f"{text['revision'][:12]}, found {found[:12]}. Put that text encoder back."
            )
        encoder = load_text_encoder(settings)
        if encoder.dimension != self.text_transform.dimension:
            raise UserError(
                f"{self.folder}: was aligned to embeddings of {self.text_transform.dimension} dimensions, its text encoder "
                f"{text['path'] or text['kind']} has {encoder.dimension}. "
                "Import it again with the text encoder that it was aligned to."
            )
        return encoder

    @property
    def _text_tower_folder(self) -> Path:
        folder = self.folder / "text_tower"
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{self.folder}: was imported without a tokenizer, so that it embeds images only. Import it again with "
                "--tokenizer FOLDER, CLIP's own (tokenizer.json)."
            )
        return folder

    @cached_property
    def _text_tower(self) -> tuple[CLIPTextModelWithProjection, TrainedTextSide]:
        folder = self._text_tower_folder
        tower = load_checked(CLIPTextModelWithProjection, folder).eval().to(self.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tower, TrainedTextSide(tokenizer, tower.config.max_position_embeddings)


def load_encoder(folder: Path) -> Encoder:
    """Raises UserError when `folder` is not a whole encoder folder."""
    try:
        return Encoder(folder)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: not a whole encoder folder: {' '.join(str(error).split())[:300]}. Export it again."
        ) from error


def encoder_hash(folder: Path) -> str:
    """Hash of everything in an encoder folder that its features depend on: all files but the model card."""
    return sha256_folder(folder, leave_out=folder / CARD)


def load_checked(model_class: Any, folder: Path) -> Any:
    """`from_pretrained` in float32 that refuses missing and unexpected weights, of which transformers only warns."""
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except (OSError, *NOT_WEIGHTS) as error:
        raise UserError(f"{folder}: expected a {model_class.__name__} folder: {error}") from error
    faults = {name: sorted(info[name])[:3] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if faults:
        raise UserError(f"{folder}: weights do not fit {model_class.__name__}: {faults}. The folder was not written whole.")
    return model


def _load_prefixed(module: nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    module.load_state_dict({name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)})
