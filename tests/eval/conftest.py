"""Tiny models and data for the tests of `eval`, built from a seed: a LLaVA folder with random weights and MMBench questions."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def encoded_image(seed: int, size: int = 40) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def question_rows() -> list[dict[str, object]]:
    """Four groups: two with four rotations, two with two options and two rotations; 12 rows, one with a hint."""
    groups = [
        (1, SHAPES, "attribute_recognition", "finegrained_perception (instance-level)"),
        (2, ("left", "right", "above", "below"), "spatial_relationship", "finegrained_perception (cross-instance)"),
        (3, ("yes", "no"), "spatial_relationship", "finegrained_perception (cross-instance)"),
        (4, ("None", "two"), "object_localization", "finegrained_perception (instance-level)"),
    ]
    rows: list[dict[str, object]] = []
    for index, options, category, l2_category in groups:
        for rotation in range(len(options)):
            rotated = options[rotation:] + options[:rotation]
            row: dict[str, object] = {
                "index": index + rotation * 1_000_000,
                "question": "Which word fits" + " this image" * index + "?",
            }
            row |= {"hint": "Look closely." if index == 3 else "", **dict.fromkeys("CD", "")}
            row |= dict(zip("ABCD", rotated, strict=False))
            row |= {"answer": "ABCD"[rotated.index(options[0])], "category": category, "image": encoded_image(index)}
            row |= {"source": "test", "l2-category": l2_category, "comment": "", "split": "dev"}
            rows.append(row)
    return rows


def write_tsv(rows: list[dict[str, object]], path: Path) -> Path:
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture(scope="session")
def mmbench() -> SimpleNamespace:
    """The functions above: `rows()`, `write(rows, path)`."""
    return SimpleNamespace(rows=question_rows, write=write_tsv)


@pytest.fixture(scope="session")
def questions_tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tsv(question_rows(), tmp_path_factory.mktemp("questions") / "questions.tsv")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA folder with random weights, wide enough that its answers vary with the image and the question."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("model") / "tiny, llava"  # the comma is a trap for lmms-eval's model_args
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # answers stand among the texts, so that " A", as the template writes an answer, becomes one token
    answers = [f"ASSISTANT: {letter}" for letter in "ABCDE"] * 200
    raw.train_from_iterator([*(str(row) for row in question_rows()), *answers], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
