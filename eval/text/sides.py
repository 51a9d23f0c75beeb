"""The text side of whatever is compared: a name or a folder comes in, a label, an encode function and a hash go out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.encoders import open_encoder
from eval.encoders.transformers_encoder import MODELS
from lift.common.errors import UserError
from lift.common.files import read_json
from lift.settings import TextEncoderSettings
from lift.text_encoders import describe_text_encoder, load_text_encoder

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class TextSide(NamedTuple):
    label: str
    """Short name for tables."""
    encode: Callable[[list[str]], NDArray[np.float32]]
    """Sentences to L2-normalised float32 features [N, D], in the order given."""
    content_hash: str
    """Of everything on disk that the features depend on."""


def open_text_encoder(name: str, max_length: int = 77, precision: Precision = "fp32") -> TextSide:
    """The text side of any encoder that `lift-eval encoder` opens, the folder of a frozen text encoder, or `minilm`.

    Args:
        max_length, precision: of a frozen text encoder; an image-text encoder says its own.
    Raises:
        UserError: nothing of these, or an encoder that is not whole. One without a text side raises when it encodes.
    """
    folder = Path(name)
    if name == "minilm":
        return _frozen(TextEncoderSettings(max_length=max_length, precision=precision), name, name)
    if folder.is_dir() and not _is_image_text(folder):
        return _frozen(TextEncoderSettings(path=name, max_length=max_length, precision=precision), folder.resolve().name, name)
    encoder = open_encoder(name)

    def encode(sentences: list[str]) -> NDArray[np.float32]:
        return encoder.align(encoder.text_embeddings(sentences))

    return TextSide(encoder.name, _checked(encode, name), encoder.content_hash)


def _is_image_text(folder: Path) -> bool:
    """By its files: an encoder of ours, a run, or a model of transformers with two towers."""
    if any((folder / file).is_file() for file in ("lift_config.json", "encoder/lift_config.json", "config.yaml")):
        return True
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return isinstance(config, dict) and config.get("model_type") in MODELS


def _frozen(settings: TextEncoderSettings, label: str, name: str) -> TextSide:
    frozen = load_text_encoder(settings)
    return TextSide(label, _checked(frozen.encode, name), describe_text_encoder(settings)["revision"])


def _checked(encode: Callable[[list[str]], Any], name: str) -> Callable[[list[str]], NDArray[np.float32]]:
    """`encode` with rows of unit length; raises UserError at a sentence without a finite feature."""

    def normalised(sentences: list[str]) -> NDArray[np.float32]:
        raw_ND = np.asarray(encode(sentences), np.float32)
        norm_N1 = np.linalg.norm(raw_ND, axis=1, keepdims=True)
        bad = ~(np.isfinite(norm_N1[:, 0]) & (norm_N1[:, 0] > 0))
        if bad.any():
            sentence = sentences[int(bad.argmax())]
            raise UserError(
                f"{name}: gives no finite feature for the sentence {sentence[:80]!r}. Remove it or check the model."
            )
        return raw_ND / norm_N1

    return normalised
