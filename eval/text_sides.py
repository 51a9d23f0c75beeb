"""The text side of whatever is compared: a name or a folder comes in, a label, an encode function and a hash go out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lift.common.errors import UserError
from lift.encoder import load_encoder
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
    """An encoder folder (`lift export`, `lift import`), the folder of a frozen text encoder, or `minilm`.

    Args:
        max_length, precision: of a frozen text encoder; an encoder folder says its own.
    Raises:
        UserError: nothing of these, or an encoder folder that is not whole. One without a text side raises when it encodes.
    """
    folder = Path(name)
    if (folder / "lift_config.json").is_file():
        encoder = load_encoder(folder)
        return TextSide(_label(folder), _checked(encoder.encode_texts, name), encoder.content_hash)
    if name == "minilm":
        settings = TextEncoderSettings(max_length=max_length, precision=precision)
    elif folder.is_dir():
        settings = TextEncoderSettings(path=name, max_length=max_length, precision=precision)
    else:
        raise UserError(
            f"{name}: expected an encoder folder (lift export), the folder of a text encoder, or minilm, found no such folder. "
            "Check the path."
        )
    frozen = load_text_encoder(settings)
    label = name if name == "minilm" else _label(folder)
    return TextSide(label, _checked(frozen.encode, name), describe_text_encoder(settings)["revision"])


def _label(folder: Path) -> str:
    """The folder's name, with its parent's where it is what every run calls its encoder."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:] if parts[-1] == "encoder" else parts[-1:])


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
