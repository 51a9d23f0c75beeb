"""The pooled last hidden states (after the final norm) of any causal LM: the paper's ablation with Vicuna and Mistral."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lift.onednn import use_onednn
from lift.settings import TextEncoderSettings
from lift.text_encoders.batching import TextEncoder, Tokenised, pad, padding_mask, tokenise_texts


class CausalLMEncoder(TextEncoder):
    """Pools over the caption's tokens, the prompt's and the special tokens the tokenizer adds; padding takes no part.

    `mean` averages them. `last` takes the end-of-sequence token: as in the official recipe for Vicuna and Mistral, whose
    tokenizers do not add it, it is put after every caption, also after a truncated one, within max_length. A tokenizer that has
    no such token leaves the caption's own last token. Batches are padded on the right whichever side the tokenizer declares,
    which changes nothing for the tokens before.

    Raises:
        ValueError: weights are missing, which transformers would draw at random.
    """

    def __init__(self, folder: Path, settings: TextEncoderSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.truncation_side = "right"
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, output_loading_info=True)
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"weights are missing, which would run at random: {sorted(info['missing_keys'])[:3]}")
        self.model: Any = model.base_model.eval().to(device)
        use_onednn(self.model)
        self.dimension = int(model.config.get_text_config().hidden_size)
        self.ending: list[int] = []
        end = self.tokenizer.eos_token_id
        if settings.pooling == "last" and end is not None and self.tokenizer("a")["input_ids"][-1] != end:
            self.ending = [end]

    def tokenise(self, captions: list[str]) -> Tokenised:
        prompted = [self.settings.prompt + caption for caption in captions]
        tokens = tokenise_texts(self.tokenizer, prompted, self.settings.max_length - len(self.ending))
        rows = [ids + self.ending for ids in tokens.rows]
        return Tokenised(rows, [len(ids) for ids in rows], tokens.truncated)

    def forward(self, rows: list[list[int]]) -> Tensor:
        ids_BL, mask_BL = pad(rows, self.tokenizer.pad_token_id or 0).to(self.device), padding_mask(rows).to(self.device)
        hidden_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).last_hidden_state
        lengths_B = mask_BL.sum(1)
        if self.settings.pooling == "last":
            return hidden_BLD[torch.arange(len(rows), device=self.device), lengths_B - 1].float()
        return (hidden_BLD.float() * mask_BL[..., None]).sum(1) / lengths_B[:, None]
