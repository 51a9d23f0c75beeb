"""Any image-text encoder for `lift-eval`: a name comes in, an object that embeds images and texts into one space goes out.

An encoder of ours (LIFT or CLIP), a CLIP, SigLIP or SigLIP 2 model of transformers, and any model of open_clip look alike from
here on, so that a published checkpoint is one more row of the same table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from PIL import Image

from lift.common.errors import UserError
from lift.common.files import read_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

__all__ = ["ACCEPTED", "ImageTextEncoder", "open_encoder"]

OPEN_CLIP = "open_clip:"
"""Begins the name of a model of the package open_clip."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ACCEPTED = (
    "a folder of lift export or lift import, a run folder of lift pretrain, a folder or hub name (OWNER/NAME) of a "
    "transformers CLIP, SigLIP or SigLIP 2 model, open_clip:ARCHITECTURE:TAG_OR_FILE, open_clip:hf-hub:OWNER/NAME or "
    "open_clip:local-dir:FOLDER"
)


class ImageTextEncoder(Protocol):
    """Images and texts to one space of D dimensions.

    Texts go two steps: `text_embeddings` gives [N, T], which may cost a forward pass of an LLM and is worth keeping on disk
    under `text_hash`; `align` maps it to [N, D], cheaply. Nothing that is returned need be normalised.
    """

    @property
    def name(self) -> str:
        """Short, for tables."""

    @property
    def content_hash(self) -> str:
        """Of everything that the features of images depend on: weights, configuration, preprocessing.

        It may take in the text side too: encoders of one content hash are the same encoder.
        """

    @property
    def text_hash(self) -> str:
        """Of everything that `text_embeddings` depends on, and as little else as can be told apart."""

    @property
    def is_clip(self) -> bool:
        """Whether images and texts were aligned by two towers of the encoder's own (CLIP, SigLIP)."""

    @property
    def has_frozen_text(self) -> bool:
        """Whether texts come from a frozen LLM instead (LIFT)."""

    @property
    def embedding_dim(self) -> int:
        """D."""

    @property
    def device(self) -> torch.device: ...

    def pixel_values(self, image: Image.Image, protocol: Literal["standard", "official"] = "standard") -> Tensor:
        """float32 [3, H, W] of an image of any mode, on the CPU; may be called from several threads.

        Args:
            protocol: standard is the model's own preprocessing; official that of the official LIFT evaluation scripts, which
                give every model ImageNet's mean and deviation (see `lift.official`).
        Raises:
            UserError: the official protocol for an encoder that does not see 224 pixels.
        """

    def image_embeddings(self, pixel_values_B3HW: Tensor) -> Tensor:
        """float32 [B, D] on `device`, not normalised."""

    def text_embeddings(self, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """float32 [N, T] in the order given, before `align`.

        Raises:
            UserError: the encoder has no text side on this machine.
        """

    def align(self, text_NT: np.ndarray) -> np.ndarray:
        """float32 [N, D] in the space of the images, not normalised.

        Raises:
            UserError: an array of another width.
        """


def open_encoder(name: str) -> ImageTextEncoder:
    """Opens an encoder by folder or name, on the GPU where there is one.

    What a folder is, its files say: `lift_config.json`, or `model_type` in `config.json`.

    Args:
        name: see `ACCEPTED`.
    Raises:
        UserError: no such folder, architecture, tag or file; a folder that is none of those; weights that are missing, damaged
            or of another shape; image and text features of different dimensions; open_clip is not installed.
    """
    if name.startswith(OPEN_CLIP):
        from eval.encoders.open_clip_encoder import OpenClipEncoder

        return OpenClipEncoder(name.removeprefix(OPEN_CLIP))
    folder = Path(name)
    if folder.is_dir():
        return _open_folder(folder)
    if folder.is_file():
        raise UserError(
            f"{name}: expected an encoder folder, found a file. A checkpoint of the official LIFT code is made a folder by "
            "lift import; one of open_clip is opened by open_clip:ARCHITECTURE:FILE."
        )
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder. Check the path, or give {ACCEPTED}.")
    from eval.encoders.transformers_encoder import TransformersEncoder, downloaded

    return TransformersEncoder(downloaded(name), name)


def _open_folder(folder: Path) -> ImageTextEncoder:
    from lift.encoder import load_encoder

    for place in (folder, folder / "encoder"):
        if (place / "lift_config.json").is_file():
            return load_encoder(place)
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: a run folder without an encoder folder. Let lift pretrain finish, or call lift export.")
    if not (folder / "config.json").is_file():
        hint = f" Give open_clip:local-dir:{folder}." if (folder / "open_clip_config.json").is_file() else ""
        raise UserError(f"{folder}: neither lift_config.json nor config.json is in it.{hint} {_expected()}")
    from eval.encoders.transformers_encoder import MODELS, TransformersEncoder

    config = read_json(folder / "config.json", "the configuration of a model")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in MODELS:
        raise UserError(
            f"{folder / 'config.json'}: expected model_type {', '.join(sorted(MODELS))}, found {model_type!r}. {_expected()}"
        )
    return TransformersEncoder(folder, folder.resolve().name)


def _expected() -> str:
    return f"Accepted are {ACCEPTED}."
