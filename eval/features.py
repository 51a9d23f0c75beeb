"""Features of an encoder for the tasks: unique images and texts come in, float32 rows go out, made once and kept on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.feature_cache import FeatureCache, cache_folder
from eval.images import ImageItem
from lift.common.errors import UserError
from lift.common.files import sha256_text
from lift.common.reading import read_ahead

if TYPE_CHECKING:
    from eval.encoders import ImageTextEncoder

Protocol = Literal["standard", "official"]
WRITE_EVERY, WRITE_SECONDS = 4096, 20
"""Rows, or time, after which what is new goes to disk: what a killed run may lose."""
TEXT_CHUNK = 512
"""Texts of like length that are encoded at a time."""


class Features:
    """What one encoder gives under one protocol.

    Texts are cached by what their raw embedding depends on (encoder, prompt, text), before anything that belongs to the image
    encoder is applied: encoders aligned to one text encoder share them.
    """

    def __init__(
        self, encoder: ImageTextEncoder, protocol: Protocol = "standard", batch_size: int | None = None, workers: int = 2
    ) -> None:
        self.encoder, self.protocol, self.workers = encoder, protocol, workers
        # on a CPU larger batches leave its cache
        self.batch_size = batch_size or (16 if encoder.device.type == "cpu" else 256)
        self._image_cache = FeatureCache(cache_folder() / f"image-{protocol}-{encoder.content_hash[:32]}")

    def images(self, items: Sequence[ImageItem], label: str = "images") -> np.ndarray:
        """float32 [N, D], L2-normalised, in the order given; each distinct image is encoded once.

        Raises:
            UserError: an image that cannot be decoded, or features that are not finite.
        """
        unique = {item.content_hash: item for item in items}
        self._fill(self._image_cache, list(unique), lambda keys: self._encode_images([unique[key] for key in keys]), label)
        return self._image_cache.read([item.content_hash for item in items])

    def texts(self, texts: Sequence[str], label: str = "texts") -> np.ndarray:
        """float32 [N, D], L2-normalised, in the order given; each distinct text is encoded once."""
        return normalised(self.aligned_texts(texts, label))

    def aligned_texts(self, texts: Sequence[str], label: str = "texts") -> np.ndarray:
        """float32 [N, D] in the image space before normalisation, as the official SugarCrepe script uses LIFT's texts.

        Raises:
            UserError: they have another dimension than the images, or are not finite.
        """
        text_ND = self.encoder.align(self.raw_texts(texts, label))
        if text_ND.shape[1] != self.encoder.embedding_dim:
            raise UserError(
                f"{self.encoder.name}: expected texts of {self.encoder.embedding_dim} dimensions, as its images have, found "
                f"{text_ND.shape[1]}. Use the text encoder that it was aligned to."
            )
        return text_ND

    def raw_texts(self, texts: Sequence[str], label: str = "texts") -> np.ndarray:
        """float32 [N, T], as the text encoder gives them."""
        # of like length together: padding is most of what a mixed batch would compute
        unique = {sha256_text(text): text for text in sorted(texts, key=len, reverse=True)}
        cache = self._text_cache()
        self._fill(cache, list(unique), lambda keys: self._encode_texts([unique[key] for key in keys]), label, unit="text")
        return cache.read([sha256_text(text) for text in texts])

    def _text_cache(self) -> FeatureCache:
        if not hasattr(self, "_texts"):  # an encoder imported without its text side has no text hash until it is asked for
            self._texts = FeatureCache(cache_folder() / f"text-{self.encoder.text_hash[:32]}")
        return self._texts

    def _encode_images(self, items: list[ImageItem]) -> Iterator[np.ndarray]:
        def pixels(item: ImageItem) -> Tensor:
            image = item.load() if self.protocol == "standard" else item.load_as_stored().convert("RGB")
            return self.encoder.pixel_values(image, self.protocol)

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for _, loaded in read_ahead(pool, pixels, items, self.batch_size):
                yield normalised(self.encoder.image_embeddings(torch.stack(loaded)).float().cpu().numpy())

    def _encode_texts(self, texts: list[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), TEXT_CHUNK):
            yield self.encoder.text_embeddings(texts[start : start + TEXT_CHUNK])

    def _fill(
        self,
        cache: FeatureCache,
        keys: list[str],
        encode: Callable[[list[str]], Iterator[np.ndarray]],
        label: str,
        unit: str = "image",
    ) -> None:
        absent = [key for key in keys if key not in cache]
        waiting: list[np.ndarray] = []
        done, written = 0, time.monotonic()
        try:
            with tqdm(total=len(absent), desc=f"encode {label}", unit=unit, disable=not absent, leave=False) as bar:
                for rows_BT in encode(absent) if absent else ():
                    if not np.isfinite(rows_BT).all():
                        raise UserError(
                            f"{self.encoder.name}: gives features that are not finite for the {label}. Check its training."
                        )
                    waiting.append(rows_BT)
                    bar.update(len(rows_BT))
                    if sum(map(len, waiting)) >= WRITE_EVERY or time.monotonic() - written > WRITE_SECONDS:
                        done, written = _write(cache, absent, done, waiting), time.monotonic()
        finally:
            _write(cache, absent, done, waiting)


def _write(cache: FeatureCache, keys: list[str], done: int, waiting: list[np.ndarray]) -> int:
    """Puts what is waiting, rows of the keys from `done` on, to disk, and returns how many keys then are."""
    if waiting:
        rows_NT = np.concatenate(waiting)
        cache.write(keys[done : done + len(rows_NT)], rows_NT)
        done += len(rows_NT)
        waiting.clear()
    return done


def normalised(rows_ND: np.ndarray) -> np.ndarray:
    """float32, each row of length 1; a row of zeros stays."""
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=-1, keepdims=True), 1e-12)
