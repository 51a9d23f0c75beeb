"""Frozen text encoders: captions in, float32 embeddings out, unnormalised unless the model or the settings normalise.

Here one is found, loaded and described; `batching.py` is what they share, and each of the other modules is one kind.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lift.common.errors import UserError, first_line
from lift.common.files import read_json, sha256_file, sha256_text
from lift.minilm import minilm_folder
from lift.settings import TextEncoderSettings
from lift.text_encoders.batching import Encoded, TextEncoder, resolve_precision
from lift.text_encoders.causal_lm import CausalLMEncoder
from lift.text_encoders.nv_embed import NVEmbedEncoder
from lift.text_encoders.sentence_transformer import SentenceTransformerEncoder

__all__ = [
    "Encoded",
    "TextEncoder",
    "describe_text_encoder",
    "describe_without_loading",
    "different_encoder",
    "load_text_encoder",
]

ENCODERS: dict[str, Any] = {
    "minilm": SentenceTransformerEncoder,
    "sentence_transformer": SentenceTransformerEncoder,
    "causal_lm": CausalLMEncoder,
    "nv_embed": NVEmbedEncoder,
}
REVISION_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*/*.safetensors", "*/*.bin", "*/*.json")
"""Weights, configurations and tokenizer, those of a sentence-transformers model's modules included."""


def load_text_encoder(settings: TextEncoderSettings) -> TextEncoder:
    """On the GPU where there is one.

    Raises:
        UserError: the model folder or name does not load, lacks weights, or (kind auto) does not say what it is.
    """
    kind, folder = _resolve(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return ENCODERS[kind](folder, settings, device)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"text_encoder.path {settings.path}: cannot load a {kind} model: {first_line(error)}") from error


def describe_text_encoder(settings: TextEncoderSettings) -> dict[str, Any]:
    """What the manifest records: the settings that change embeddings, and the revision (hash of weights and tokenizer).

    Kind and precision are those that `auto` means for this model on this machine. Without `revision`, the description makes
    settings of the same encoder again.
    """
    kind, folder = _resolve(settings)
    return _describe(settings, kind, _revision(folder))


def describe_without_loading(settings: TextEncoderSettings) -> dict[str, Any]:
    """As `describe_text_encoder`, but a model that is not on this machine is not fetched: its revision is None.

    Embeddings that are there, made here or elsewhere, are used without their model.

    Raises:
        UserError: kind auto of a model that is not here to say what it is.
    """
    if settings.path is None or Path(settings.path).is_dir() or _is_downloaded(settings.path):
        return describe_text_encoder(settings)
    if settings.kind == "auto":
        raise UserError(f"text_encoder.kind: {settings.path} is not on this machine to say what it is. Give its kind.")
    return _describe(settings, settings.kind, None)


def different_encoder(settings: TextEncoderSettings, found: dict[str, Any]) -> dict[str, Any]:
    """What `settings` ask for that the description `found`, of a store, says otherwise; empty for the same encoder.

    The revision decides whether it is the same model, wherever it lies; where one side does not know it, the path does.
    """
    wanted = describe_without_loading(settings)
    left_out = {"path"} if wanted["revision"] and found.get("revision") else {"revision"}
    if settings.precision == "auto":  # what it means here may not be what it meant where the store was made
        left_out.add("precision")
    return {name: value for name, value in wanted.items() if name not in left_out and found.get(name) != value}


def _revision(folder: Path) -> str:
    files = sorted({file for pattern in REVISION_FILES for file in folder.glob(pattern)})
    hashes = [f"{file.relative_to(folder)} {_hash_once(file, file.stat().st_size, file.stat().st_mtime_ns)}" for file in files]
    return sha256_text(json.dumps(hashes))


def _describe(settings: TextEncoderSettings, kind: str, revision: str | None) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": kind, "path": settings.path, "revision": revision, "prompt": settings.prompt}
    described |= {"max_length": settings.max_length, "precision": resolve_precision(settings.precision)}
    described |= {"normalise": settings.normalise}
    return described | ({"pooling": settings.pooling} if kind == "causal_lm" else {})


@cache
def _hash_once(file: Path, size: int, written: int) -> str:
    """Of a file that is the same as at the last call: the weights of an LLM take a minute to read."""
    return sha256_file(file)


def _resolve(settings: TextEncoderSettings) -> tuple[str, Path]:
    """The kind, never auto, and the model's folder."""
    if settings.path is None:
        return "minilm", minilm_folder()
    folder = _model_folder(settings.path)
    return _declared_kind(folder) if settings.kind == "auto" else settings.kind, folder


def _declared_kind(folder: Path) -> str:
    """What a model folder says of itself; NV-Embed-v2 comes first, because its folder also holds a modules.json."""
    has_config = (folder / "config.json").is_file()
    config = read_json(folder / "config.json", "the configuration of a model") if has_config else {}
    architectures = config.get("architectures") or []
    if config.get("model_type") == "nvembed" or "NVEmbedModel" in architectures:
        return "nv_embed"
    if (folder / "modules.json").is_file():
        return "sentence_transformer"
    if set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return "causal_lm"
    raise UserError(
        f"text_encoder.path {folder}: expected an NV-Embed model, a sentence-transformers model (modules.json) or a causal LM, "
        f"found {'the architectures ' + str(architectures) if has_config else 'no config.json'}. Give text_encoder.kind."
    )


def _model_folder(path: str) -> Path:
    """The folder itself, or the snapshot of a hub name (fetched when it is not there and the hub can be reached)."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path))
    except (OSError, ValueError) as error:
        raise UserError(f"text_encoder.path {path}: no such folder, and no model of that name: {first_line(error)}") from error


def _is_downloaded(name: str) -> bool:
    try:
        snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True
