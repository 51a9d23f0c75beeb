"""The demo's causal language model: the world's texts in, a folder that transformers loads out.

It stands for the LLM of a real run and is used twice, as the paper's ablation uses Vicuna: as a frozen text encoder for LIFT
and as LLaVA's language model. It learns captions, and multiple-choice questions about scenes that are told in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.settings import LanguageModelSettings
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, read_jsonl, sha256_file, write_json
from lift.common.settings import to_plain

VOCABULARY_SIZE = 2048
PADDING, END, IMAGE = "<pad>", "</s>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}USER: {{ message['content'] }} ASSISTANT:{% endif %}{% endfor %}"
)
"""The question ends in `ASSISTANT:`, so that a generation prompt adds nothing to it."""
WORDS = (
    r"(?:\n[A-D]\. [^\n]+)+| There are several options:|\s*Answer with the option[^.]+\.| at the (?:top|bottom) (?:left|right)"
    r"| ?\p{L}+| ?[^\s\p{L}]+|\s"
)
"""What becomes one token: a list of options, the sentences around it, a place, and otherwise a word.

A model of a million parameters would need far longer than the demo lasts to learn to search through a list of options.
"""
IGNORED = -100


def train_language_model(settings: LanguageModelSettings) -> None:
    """Writes the folder, or leaves it when it was made from these texts with these settings."""
    record = {key: value for key, value in to_plain(settings).items() if key not in ("texts", "out")}
    record["texts_sha256"] = sha256_file(settings.texts) if settings.texts.is_file() else None
    if (settings.out / "training.json").is_file() and read_json(settings.out / "training.json")["made_from"] == record:
        print(f"{settings.out}: the language model is trained, reused")
        return
    check_output_folder(settings.out, "training.json")
    rows = read_jsonl(settings.texts, "the language model's texts")
    if not rows:
        raise UserError(f"{settings.texts}: expected texts, found none. Write the world again.")
    spans = [_spans(row) for row in rows]
    tokenizer = _train_tokenizer(text.removesuffix(END) for parts in spans for text, _ in parts)
    examples = [_encode(parts, tokenizer) for parts in spans]
    model = _make_model(tokenizer, settings)
    losses = list(_train(model, examples, settings))
    with atomic_folder(settings.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", {"made_from": record, "losses": losses})
    print(f"{settings.out}: language model of {sum(p.numel() for p in model.parameters()):,} parameters")


def _spans(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """The text in parts, each with whether it is learned; `messages` read as CHAT_TEMPLATE writes them."""
    if "text" in row:
        return [(row["text"] + END, True)]
    return [
        (f" {turn['content']}{END}", True) if turn["role"] == "assistant" else (f"USER: {turn['content']} ASSISTANT:", False)
        for turn in row["messages"]
    ]


def _train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, large enough for every word of the world to be one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PADDING, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PADDING,
        eos_token=END,
        additional_special_tokens=[IMAGE],
        chat_template=CHAT_TEMPLATE,
    )


def _encode(parts: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """(ids, labels). Parts end in a special token or begin with a space or word, so that no token spans two of them."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in parts:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if learned else [IGNORED] * len(part)
    return ids, labels


def _make_model(tokenizer: PreTrainedTokenizerFast, settings: LanguageModelSettings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=1024,
        initializer_range=0.1,  # of the order of width^-0.5; with 0.02 a model this narrow does not leave its first plateau
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM, examples: list[tuple[list[int], list[int]]], settings: LanguageModelSettings
) -> Iterator[dict[str, float]]:
    """AdamW, warm-up over a twentieth, cosine to zero. Yields the mean loss of every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = [batch for epoch in range(settings.epochs) for batch in _batches(examples, settings, epoch)]
    warmup = max(1, len(batches) // 20)
    window: list[float] = []
    model.train()
    progress = tqdm(batches, desc="train language model", unit="step")
    for step, batch in enumerate(progress):
        decayed = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, len(batches) - warmup)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min((step + 1) / warmup, decayed if step >= warmup else 1)
        loss = _loss(model, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.append(loss.item())
        if len(window) == 50 or step + 1 == len(batches):
            mean = round(float(np.mean(window)), 4)
            progress.set_postfix(loss=mean)
            yield {"step": step + 1, "loss": mean}
            window = []
    model.eval()


def _batches(examples: list[tuple[list[int], list[int]]], settings: LanguageModelSettings, epoch: int) -> list[list[int]]:
    """Batches of like length in random order; a pure function of (seed, epoch)."""
    rng = np.random.default_rng([settings.seed, epoch])
    order = rng.permutation(len(examples))
    pool = 32 * settings.batch_size
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool].tolist(), key=lambda i: len(examples[i][0]))
        batches += [by_length[i : i + settings.batch_size] for i in range(0, len(by_length), settings.batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _loss(model: LlamaForCausalLM, batch: list[tuple[list[int], list[int]]]) -> Tensor:
    length = max(len(ids) for ids, _ in batch)
    ids_BL = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
    labels_BL = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in batch])
    # padding is on the right, so causal attention alone keeps it out of sight; logits are made only where they are learned
    hidden_BLD = model.model(input_ids=ids_BL).last_hidden_state[:, :-1]
    targets_BL = labels_BL[:, 1:]
    learned = targets_BL != IGNORED
    return F.cross_entropy(model.lm_head(hidden_BLD[learned]), targets_BL[learned])
