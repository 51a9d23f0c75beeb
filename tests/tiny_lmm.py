"""Tiny models and data for the tests of `lmm`: a 3-layer vision tower, a 2-layer Llama with a byte-level tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "white": (250, 250, 250)}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tower(folder: Path) -> Path:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        hidden_act="gelu", attention_dropout=0.5,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({f"vision_model.{k}": v for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_tokenizer(with_image: bool = True, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>"] + (["<image>"] if with_image else [])
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = {"additional_special_tokens": ["<image>"]} if with_image else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_template,
        **extra,
    )


def make_llm(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int, tied: bool = False) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversation(name: str, answer: str, image: str | None, question: str = "Which colour?") -> dict:
    value = f"<image>\n{question}" if image else question
    row = {"id": name, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}
    return row | ({"image": image} if image else {})
