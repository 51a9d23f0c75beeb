"""Any sentence-transformers model over text, run from token ids: its own tokenizer, prompt, pooling and further modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lift.onednn import use_onednn
from lift.settings import TextEncoderSettings
from lift.text_encoders.batching import TextEncoder, Tokenised, overflowed, pad


class SentenceTransformerEncoder(TextEncoder):
    """Embeds as `SentenceTransformer.encode` does; the transformer runs in the precision asked for, what follows in float32.

    Raises:
        ValueError: the model's first module is not a transformer over plain text.
    """

    def __init__(self, folder: Path, settings: TextEncoderSettings, device: torch.device) -> None:
        from sentence_transformers import SentenceTransformer  # several seconds to import
        from sentence_transformers.base.modules import Transformer

        super().__init__(settings, device)
        model: Any = SentenceTransformer(
            str(folder), device=str(device), trust_remote_code=False, model_kwargs={"dtype": self.dtype}
        ).eval()
        transformer = model[0]
        if not isinstance(transformer, Transformer) or set(transformer.modality_config) != {"text"}:
            raise ValueError(f"its first module is {type(transformer).__name__}, expected a transformer over text alone")
        transformer.unpad_inputs = False
        use_onednn(transformer)
        self.transformer: Any = transformer
        self.further_modules = [module.float() for module in list(model)[1:]]
        self.tokenizer = transformer.tokenizer
        self.prompt = settings.prompt or model.prompts.get(model.default_prompt_name)
        self.max_length = min(settings.max_length, model.max_seq_length or settings.max_length)
        self.prompt_length: dict[str, int] = {}
        self.dimension = int(model.get_embedding_dimension())

    def tokenise(self, captions: list[str]) -> Tokenised:
        ragged = {"text": {"padding": False, "max_length": self.max_length}, "common": {"return_tensors": None}}
        features = self.transformer.preprocess(captions, prompt=self.prompt, processing_kwargs=ragged)
        # of use to a pooling that leaves the prompt out
        self.prompt_length = {name: features[name] for name in ("prompt_length",) if name in features}
        columns = [name for name in self.tokenizer.model_input_names if name in features]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*(features[name] for name in columns), strict=True)]
        return Tokenised(rows, [len(row["input_ids"]) for row in rows], overflowed(features))

    def forward(self, rows: list[dict[str, list[int]]]) -> Tensor:
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        features: dict[str, Any] = {
            name: pad([row[name] for row in rows], padding.get(name, 0), self.tokenizer.padding_side).to(self.device)
            for name in rows[0]
        }
        features = self.transformer(features | {"modality": "text"} | self.prompt_length)
        output = self.transformer.module_output_name
        features[output] = features[output].float()
        for module in self.further_modules:
            features = module(features)
        return features["sentence_embedding"][:, : self.dimension].float()
