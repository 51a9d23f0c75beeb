"""What encoders of other packages share: two towers trained together, whose texts are in the images' space from the start."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lift.common.errors import UserError
from lift.official import NOT_WEIGHTS, official_evaluation_pixels, require_official_size

LOADING_ERRORS = (*NOT_WEIGHTS, OSError, AssertionError, ImportError)
"""What transformers, open_clip and timm raise for models that do not load or run."""
REASON_LENGTH = 300
"""Characters of another package's message that are shown."""


class DualEncoder(ABC):
    """An image tower and a text tower; subclasses load them and say how each is called.

    A subclass sets the attributes below and calls `_check_dimensions` at the end of its constructor.
    """

    is_clip = True
    has_frozen_text = False
    name: str
    device: torch.device
    image_size: int | None
    """Pixels of a side, None for another shape than a square or for none that is fixed."""
    embedding_dim: int
    content_hash: str
    """Takes in the text tower: results are reused by it, and they depend on both."""
    text_hash: str

    def pixel_values(self, image: Image.Image, protocol: Literal["standard", "official"] = "standard") -> Tensor:
        """float32 [3, H, W] of an image of any mode.

        Raises:
            UserError: the official protocol for an encoder that does not see 224 pixels.
        """
        if protocol == "standard":
            return self._own_pixels(image.convert("RGB"))
        require_official_size(self.name, self.image_size)
        return official_evaluation_pixels(image)

    @torch.inference_mode()
    def image_embeddings(self, pixel_values_B3HW: Tensor) -> Tensor:
        """float32 [B, D] on the encoder's device, not normalised."""
        return self._embed_images(pixel_values_B3HW.to(self.device)).float()

    @torch.inference_mode()
    def text_embeddings(self, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """float32 [N, D], in the order given, not normalised."""
        out_ND = np.empty((len(texts), self.embedding_dim), np.float32)
        for start in range(0, len(texts), batch_size):
            out_ND[start : start + batch_size] = self._embed_texts(texts[start : start + batch_size]).float().cpu().numpy()
        return out_ND

    def align(self, text_NT: np.ndarray) -> np.ndarray:
        """`text_NT` itself, float32 [N, D].

        Raises:
            UserError: another width than D.
        """
        if text_NT.ndim != 2 or text_NT.shape[1] != self.embedding_dim:
            raise UserError(
                f"{self.name}: expected text embeddings of {self.embedding_dim} dimensions, found an array of shape "
                f"{list(text_NT.shape)}. Embed the texts with this encoder."
            )
        return text_NT

    @abstractmethod
    def _own_pixels(self, image: Image.Image) -> Tensor:
        """float32 [3, H, W] of an RGB image by the model's own preprocessing."""

    @abstractmethod
    def _embed_images(self, pixel_values_B3HW: Tensor) -> Tensor: ...

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor: ...

    @torch.inference_mode()
    def _check_dimensions(self) -> None:
        """Embeds one image and one text: the towers, preprocessing and tokenizer then fit each other. Sets `embedding_dim`.

        Raises:
            UserError: the features have different dimensions.
        """
        pixels_13HW = self._own_pixels(Image.new("RGB", (64, 48)))[None]
        image_dim = self._embed_images(pixels_13HW.to(self.device)).shape[-1]
        text_dim = self._embed_texts(["a"]).shape[-1]
        if image_dim != text_dim:
            raise UserError(
                f"{self.name}: its image features have {image_dim} dimensions, its text features {text_dim}; they are in no "
                "common space. Choose a model that was trained to match images with texts."
            )
        self.embedding_dim = int(image_dim)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def reason(error: Exception) -> str:
    """Another package's message on one line, cut where it lists hundreds of names."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]} ..."


def hash_tensors(tensors: Mapping[str, Tensor], described: Any) -> str:
    """Over names, types, shapes and bytes of tensors in the order of their names, and a description that JSON can hold."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_text_weight(name: str, vision: tuple[str, ...]) -> bool:
    """Whether a text's embedding depends on a tensor: all but the image tower's and the temperature."""
    return not name.startswith((*vision, "logit_scale", "logit_bias"))
