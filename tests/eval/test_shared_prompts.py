"""Prompts that begin alike: what is shared, what is not, and that the answers are those of one prompt at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Lfm2Config, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from eval.lmm.shared_prompts import Prompt, generate, split_prompts
from lmm.inference import load_whole

os.environ["HF_HUB_OFFLINE"] = "1"

IMAGE = 9


def _prompt(ids: list[int], *images: str) -> Prompt:
    return Prompt(ids, images, [])


def test_prompts_of_an_image_share_what_is_equal_and_each_keeps_a_token() -> None:
    prompts = [
        _prompt([1, IMAGE, IMAGE, 2, 3, 4, 7], "red"),
        _prompt([1, IMAGE, IMAGE, 2, 3, 4, 7], "blue"),  # equal tokens, another image
        _prompt([1, IMAGE, IMAGE, 2, 3, 5, 6, 7], "red"),
        _prompt([1, 2, 3], ),
        _prompt([1, IMAGE, IMAGE, 2, 3], "red"),  # the beginning of others
        _prompt([1, IMAGE, 5, IMAGE, 8], "red", "blue"),
        _prompt([1, IMAGE, 6, IMAGE, 8], "red", "blue"),  # differs between its images
        _prompt([1, 4, 3, 2], ),
    ]  # fmt: skip
    assert split_prompts(prompts, IMAGE) == ([[0, 2, 4], [1], [3, 7], [5], [6]], [4, 6, 1, 4, 4])
    assert split_prompts([_prompt([5, 6])] * 2, IMAGE) == ([[0, 1]], [1])  # equal to the end


ASKED = [("red", "what is it"), ("blue", "what is it"), ("red", "what is left of the thing"), ("red", ""), ("", "no image")]


class OneByOne:
    """A LLaVA with what plain transformers answers, one prompt at a time."""

    settings: ClassVar = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}

    def __init__(self, folder: Path, text_config: Any = None) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.processor.tokenizer.padding_side = "left"
        self.model = load_whole(folder, "float32")
        if text_config is not None:
            torch.manual_seed(0)
            config = self.model.config.to_dict() | {"text_config": text_config}
            self.model = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
        self.read: list[tuple[int, int]] = []
        layers = self.model.model.language_model.layers
        layers[0].register_forward_pre_hook(lambda layer, inputs: self.read.append(tuple(inputs[0].shape[:2])))

    def answers(self, asked: list[tuple[str, str]], template: str = "USER: {image}\n{text} ASSISTANT:") -> list[Prompt]:
        """Answers in a batch; their equality with those of single prompts is checked. `self.read` is left as the batch's."""
        prompts, expected = [], []
        with torch.inference_mode():
            for name, text in asked:
                rendered = template.format(image="<image>" if name else "", text=text)
                image = Image.new("RGB", (40, 30), name) if name else None
                inputs = self.processor(text=rendered, images=image, return_tensors="pt")
                expected.append(self.model.generate(**inputs, **self.settings)[0, inputs["input_ids"].shape[1] :])
                pixels = inputs.get("pixel_values")
                features = [] if pixels is None else list(self.model.get_image_features(pixel_values=pixels).pooler_output)
                prompts.append(Prompt(inputs["input_ids"][0].tolist(), (name,) if name else (), features))
            self.read.clear()
            tokens = generate(self.model, self.processor.tokenizer, prompts, **self.settings)
        assert torch.equal(tokens, torch.stack(expected)) and len({tuple(row.tolist()) for row in tokens}) > 1
        return prompts


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tokens_are_those_of_one_prompt_at_a_time_and_beginnings_are_read_once(tiny_llava: Path, implementation: str) -> None:
    llava = OneByOne(tiny_llava)
    llava.model.set_attn_implementation(implementation)
    prompts = llava.answers(ASKED)
    (members, lengths), longest = (
        split_prompts(prompts, llava.model.config.image_token_id),
        max(len(each.ids) for each in prompts),
    )
    rest = max(len(prompts[n].ids) - length for numbers, length in zip(members, lengths, strict=True) for n in numbers)
    assert llava.read[:3] == [(3, max(lengths)), (5, rest), (5, 1)]
    assert 3 * max(lengths) + 5 * rest < 5 * longest


@pytest.mark.parametrize(
    ("asked", "template"),
    [
        ([("red", "what is it"), ("blue", "what is it"), ("", "no image")], "USER: {image}\n{text} ASSISTANT:"),
        ([("", "one"), ("", "two")], "{text}{image}"),  # not one token in common
        ([("red", "one"), ("red", "two"), ("red", "two or three")], "{text}{image}"),  # an image at the end
    ],
)
def test_prompts_that_share_nothing_are_read_whole(tiny_llava: Path, asked: list[tuple[str, str]], template: str) -> None:
    llava = OneByOne(tiny_llava)
    prompts = llava.answers(asked, template)
    assert llava.read[:2] == [(len(asked), max(len(each.ids) for each in prompts)), (len(asked), 1)]


def _window(vocabulary: int) -> MistralConfig:
    return MistralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, sliding_window=12, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip


def _convolution(vocabulary: int) -> Lfm2Config:
    return Lfm2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], initializer_range=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("text_config", [_window, _convolution])
def test_padding_in_the_middle_is_not_given_to_models_that_it_would_change(tiny_llava: Path, text_config: Any) -> None:
    vocabulary = load_whole(tiny_llava, "float32").config.text_config.vocab_size
    llava = OneByOne(tiny_llava, text_config(vocabulary))
    prompts = llava.answers(ASKED)
    assert llava.read[0] == (5, max(len(each.ids) for each in prompts))
