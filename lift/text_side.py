"""The text side of a batch: rows of an embedding store for LIFT, token ids for the CLIP baseline."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.settings import ClipTextSettings
from lift.sources import Shard
from lift.store import EmbeddingStore, text_hashes

START, END = "<|startoftext|>", "<|endoftext|>"


class FixedTextSide:
    """Looks up the embeddings of a batch; rows are found, and their captions checked, once at the start.

    A caption without an embedding keeps its place in the order, so that the baseline sees the same batches: it is not usable.
    """

    def __init__(self, store: EmbeddingStore, shards: list[Shard], ledger: DropLedger) -> None:
        self.store = store
        self._row_of_caption: dict[str, int] = {}
        for shard in shards:
            captions = [(sample.key, key, text) for sample in shard.samples for key, text in sample.captions.items()]
            keys = [key for _, key, _ in captions]
            rows = store.match(shard.name, keys, text_hashes([text for _, _, text in captions]))
            for (sample_key, key, _), row in zip(captions, rows.tolist(), strict=True):
                if row < 0:
                    ledger.drop(sample_key, "no embedding of a caption", f"{key} in {store.folder}")
                else:
                    self._row_of_caption[key] = row

    def is_usable(self, caption_key: str) -> bool:
        return caption_key in self._row_of_caption

    def __call__(self, caption_keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        rows = np.array([self._row_of_caption.get(key, 0) for key in caption_keys])
        return {"embeddings": torch.from_numpy(self.store.rows(rows))}


class TrainedTextSide:
    """Tokenises the captions of a batch, cut at the context length with the end token kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def is_usable(self, caption_key: str) -> bool:
        return True

    def __call__(self, caption_keys: list[str], captions: list[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(captions, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def clip_tokenizer(settings: ClipTextSettings, captions: list[str]) -> PreTrainedTokenizerBase:
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
