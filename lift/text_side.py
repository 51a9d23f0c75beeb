"""The text side of a batch: rows of an embedding store for LIFT, token ids for the CLIP baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.settings import ClipTextSettings
from lift.sources import Sample
from lift.store import EmbeddingStore

START, END = "<|startoftext|>", "<|endoftext|>"


class FixedTextSide:
    """Looks up the embeddings of a batch; rows are found, and their captions checked, once at the start."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._row_of_caption: dict[str, int] = {}

    def match(self, samples: list[Sample], ledger: DropLedger) -> list[Sample]:
        """Samples with the captions that have an embedding; those without any go to the ledger."""
        matched = []
        for sample in samples:
            rows = {key: self.store.find(key, caption) for key, caption in sample.captions.items()}
            self._row_of_caption |= {key: row for key, row in rows.items() if row is not None}
            captions = {key: caption for key, caption in sample.captions.items() if rows[key] is not None}
            if captions:
                matched.append(Sample(sample.key, captions, sample.image))
            else:
                ledger.drop(sample.key, "no embedding of this caption", str(self.store.folder))
        return matched

    def __call__(self, caption_keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        rows = np.array([self._row_of_caption[key] for key in caption_keys])
        return {"embeddings": torch.from_numpy(self.store.rows(rows))}


class TrainedTextSide:
    """Tokenises the captions of a batch, cut at the context length with the end token kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, caption_keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(captions, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def clip_tokenizer(settings: ClipTextSettings, captions: list[str], saved: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `saved`, or `settings.tokenizer`, or a lower-casing byte-level BPE trained on `captions`.

    Raises:
        UserError: the folder given has no tokenizer, or one without start, end and padding tokens.
    """
    folder = saved if saved.is_dir() else settings.tokenizer
    if folder is None:
        return _train_tokenizer(captions, settings.vocabulary_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"clip_text.tokenizer {folder}: no tokenizer can be loaded from there: {error}") from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"clip_text.tokenizer {folder}: CLIP's text tower needs a {name}, this tokenizer has none.")
    return tokenizer


def _train_tokenizer(captions: list[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    ids = {token: bpe.token_to_id(token) for token in (START, END)}
    bpe.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=START, eos_token=END, pad_token=END, unk_token=END)
