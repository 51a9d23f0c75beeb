"""The text side of a batch: rows of an embedding store for LIFT, token ids for the CLIP baseline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.settings import ClipTextSettings, NegativeSettings
from lift.sources import Samples
from lift.store import EmbeddingStore

START, END = "<|startoftext|>", "<|endoftext|>"
LOOKED_AT = 1000
"""Images that are looked at for hard negatives at the start."""


class FixedTextSide:
    """Looks up the embeddings of a batch; rows are found, and their captions checked, once at the start.

    A caption without an embedding keeps its place in the order, so that the baseline sees the same batches: it is not usable.
    Takes 8 bytes for each caption.
    """

    def __init__(
        self, store: EmbeddingStore, samples: Samples, ledger: DropLedger, negatives: ExtraNegatives | None = None
    ) -> None:
        self.store, self.negatives = store, negatives
        found = []
        for shard in samples.shards:
            keys, hashes = shard.caption_keys_and_hashes()
            found.append(store.match(shard.name, keys, hashes))
            for number in np.flatnonzero(found[-1] < 0):
                key = keys[int(number)].as_py()
                ledger.drop(key.rpartition("#")[0], "no embedding of a caption", f"{key} in {store.folder}")
        self._rows = np.concatenate(found)

    def is_usable(self, caption_numbers: np.ndarray) -> np.ndarray:
        return self._rows[caption_numbers] >= 0

    def __call__(self, step: int, caption_numbers: np.ndarray, keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        """`embeddings` [B, D] as they are stored, and the negatives when there are some."""
        batch = {"embeddings": torch.from_numpy(self.store.rows(self._rows[caption_numbers].clip(0)))}
        return batch if self.negatives is None else batch | self.negatives(step, keys)


class ExtraNegatives:
    """Captions of a bank, and hard negatives of each image, as rows of embedding stores of the run's text encoder.

    Raises:
        UserError: a store was made by another text encoder, or has hard negatives of none of the first images.
    """

    def __init__(self, settings: NegativeSettings, encoder: dict[str, Any], samples: Samples, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.bank = None if settings.bank is None else _store_of(settings.bank, encoder, "negatives.bank")
        self.hard = None if settings.hard is None else _store_of(settings.hard, encoder, "negatives.hard")
        if self.hard is not None:
            keys = [samples.key(number) for number in range(min(LOOKED_AT, len(samples)))]
            if (self._hard_rows(self.hard, keys) < 0).all():
                raise UserError(
                    f"negatives.hard {self.hard.folder}: expected keys such as '{keys[0]}#0', found none of the first "
                    f"{len(keys)} images. Make it with lift embed --captions from a JSONL whose key is the sample's key and #0."
                )

    def __call__(self, step: int, keys: list[str]) -> dict[str, Tensor]:
        """`bank` [N, D], the same on every process; `hard` [B, K, D] and `hard_valid` [B, K]."""
        batch: dict[str, Tensor] = {}
        if self.bank is not None:
            generator = np.random.default_rng([self.seed, step, 3])
            chosen = generator.choice(len(self.bank), min(self.settings.bank_rows, len(self.bank)), replace=False)
            batch["bank"] = torch.from_numpy(self.bank.rows(np.sort(chosen)))
        if self.hard is not None:
            rows_BK = self._hard_rows(self.hard, keys)
            found = torch.from_numpy(self.hard.rows(rows_BK.clip(0).reshape(-1)))
            batch |= {"hard": found.view(*rows_BK.shape, -1), "hard_valid": torch.from_numpy(rows_BK >= 0)}
        return batch

    def _hard_rows(self, store: EmbeddingStore, keys: list[str]) -> np.ndarray:
        """int64 [B, K], -1 where there is none."""
        wanted = [f"{key}#{number}" for key in keys for number in range(self.settings.hard_per_image)]
        return store.match("", wanted).reshape(len(keys), self.settings.hard_per_image)


def _store_of(folder: Path, encoder: dict[str, Any], setting: str) -> EmbeddingStore:
    store = EmbeddingStore(folder)
    if store.manifest["encoder"] != encoder:
        raise UserError(
            f"{setting} {folder}: made with the text encoder {store.manifest['encoder']}, but the run's is {encoder}. "
            "Embed these captions with the run's text encoder."
        )
    return store


class TrainedTextSide:
    """Tokenises the captions of a batch, cut at the context length with the end token kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def is_usable(self, caption_numbers: np.ndarray) -> np.ndarray:
        return np.ones(len(caption_numbers), bool)

    def __call__(self, step: int, caption_numbers: np.ndarray, keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        return self.tokenise(captions)

    def tokenise(self, captions: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 [B, L], padded to the longest."""
        batch = self.tokenizer(captions, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def clip_tokenizer(settings: ClipTextSettings, captions: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in `settings.tokenizer`, or else a lower-casing byte-level BPE trained on `captions`.

    Raises:
        UserError: the folder given has no tokenizer, or one without start, end and padding tokens, or that does not end a
            caption with the end token.
    """
    folder = settings.tokenizer
    if folder is None:
        return _train_tokenizer(captions, settings.vocabulary_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"clip_text.tokenizer {folder}: no tokenizer can be loaded from there: {error}") from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"clip_text.tokenizer {folder}: CLIP's text tower needs a {name}, this tokenizer has none.")
    for caption in ("a", "a " * settings.context_length):
        ids = tokenizer(caption, truncation=True, max_length=settings.context_length)["input_ids"]
        # transformers takes the largest id for the end token when the configured one is 2 (CLIP's early configurations)
        if ids[-1] != tokenizer.eos_token_id or tokenizer.eos_token_id == 2:
            raise UserError(
                f"clip_text.tokenizer {folder}: CLIP's text feature is taken at the end token, but this tokenizer does not end "
                "a caption with it, or its id is 2. Leave clip_text.tokenizer out to train one, or give CLIP's own."
            )
    return tokenizer


def _train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
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
