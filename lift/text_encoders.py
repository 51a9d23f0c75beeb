"""Frozen text encoders: captions in, float32 embeddings out, unnormalised unless the model itself normalises.

One class wraps sentence-transformers models, one pools the hidden states of any causal LM (the paper's ablation).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lift.common.errors import UserError
from lift.common.files import sha256_file, sha256_text
from lift.minilm import minilm_folder
from lift.settings import TextEncoderSettings


class TextEncoder(Protocol):
    dimension: int

    def encode(self, captions: list[str], progress: str | None = None) -> np.ndarray:
        """float32 [len(captions), dimension], in the order given."""
        ...


def load_text_encoder(settings: TextEncoderSettings) -> TextEncoder:
    """Raises UserError when the model folder or name does not load."""
    loader = _SentenceTransformerEncoder if settings.kind != "causal_lm" else _CausalLMEncoder
    path = str(minilm_folder()) if settings.kind == "minilm" else str(settings.path)
    try:
        return loader(path, settings)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"text_encoder.path {path}: cannot load a {settings.kind} model: {_first_line(error)}") from error


def describe_text_encoder(settings: TextEncoderSettings) -> dict[str, Any]:
    """What the manifest records: the settings that change embeddings, and the revision (hash of weights and tokenizer)."""
    folder = minilm_folder() if settings.kind == "minilm" else _model_folder(str(settings.path))
    files = sorted(file for pattern in ("*.safetensors", "*.bin", "*.json", "*/config.json") for file in folder.glob(pattern))
    revision = sha256_text(json.dumps([f"{file.relative_to(folder)} {sha256_file(file)}" for file in files]))
    described: dict[str, Any] = {"kind": settings.kind, "path": settings.path, "revision": revision, "prompt": settings.prompt}
    described |= {"max_length": settings.max_length}
    return described | ({"pooling": settings.pooling} if settings.kind == "causal_lm" else {})


def _model_folder(path: str) -> Path:
    """The folder itself, or the snapshot of a hub name (fetched when it is not there and the hub can be reached)."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path))
    except (OSError, ValueError) as error:
        raise UserError(f"text_encoder.path {path}: no such folder, and no model of that name: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _SentenceTransformerEncoder:
    def __init__(self, path: str, settings: TextEncoderSettings) -> None:
        from sentence_transformers import SentenceTransformer  # several seconds to import

        self.model = SentenceTransformer(path, device=str(_device()), trust_remote_code=False)
        self.model.max_seq_length = min(settings.max_length, self.model.max_seq_length or settings.max_length)
        self.settings = settings
        self.dimension = int(self.model.get_embedding_dimension() or 0)

    def encode(self, captions: list[str], progress: str | None = None) -> np.ndarray:
        prompted = [self.settings.prompt + caption for caption in captions]
        return _in_batches(prompted, self.settings.batch_size, self._encode_batch, self.dimension, progress)

    def _encode_batch(self, captions: list[str]) -> np.ndarray:
        return self.model.encode(captions, batch_size=len(captions), convert_to_numpy=True, show_progress_bar=False)


class _CausalLMEncoder:
    """Mean or last-token pooling of the last hidden state (after the final norm), padding excluded."""

    def __init__(self, path: str, settings: TextEncoderSettings) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.tokenizer.padding_side = "right"
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"weights are missing, which would run at random: {sorted(info['missing_keys'])[:3]}")
        model = model.eval().to(_device())
        self.model: Any = model.base_model
        self.settings = settings
        self.dimension = int(model.config.get_text_config().hidden_size)

    def encode(self, captions: list[str], progress: str | None = None) -> np.ndarray:
        prompted = [self.settings.prompt + caption for caption in captions]
        return _in_batches(prompted, self.settings.batch_size, self._encode_batch, self.dimension, progress)

    @torch.inference_mode()
    def _encode_batch(self, captions: list[str]) -> np.ndarray:
        batch = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.settings.max_length, return_tensors="pt"
        ).to(self.model.device)
        hidden_BLD = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        mask_BL = batch["attention_mask"].float()
        if self.settings.pooling == "mean":
            pooled_BD = (hidden_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        else:
            last_B = mask_BL.sum(1).long() - 1
            pooled_BD = hidden_BLD[torch.arange(len(captions), device=hidden_BLD.device), last_B]
        return pooled_BD.cpu().numpy()


def _in_batches(texts: list[str], batch_size: int, encode: Any, dimension: int, progress: str | None) -> np.ndarray:
    """Encodes each distinct text once, longest first, so that a batch holds texts of like length."""
    distinct = sorted(set(texts), key=lambda text: (-len(text), text))
    embeddings = np.empty((len(distinct), dimension), np.float32)
    with tqdm(total=len(distinct), desc=progress, unit="caption", disable=progress is None, leave=False) as bar:
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            embeddings[start : start + len(batch)] = encode(batch)
            bar.update(len(batch))
    row = {text: index for index, text in enumerate(distinct)}
    return embeddings[[row[text] for text in texts]]
