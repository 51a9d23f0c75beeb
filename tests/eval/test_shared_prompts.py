"""Prompts that begin alike: what is shared, what is not, and that the answers are those of one prompt at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

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
    with pytest.raises(ValueError, match="ends with an image"):
        split_prompts([_prompt([1, IMAGE], "red")], IMAGE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tokens_are_those_of_one_prompt_at_a_time_and_beginnings_are_read_once(tiny_llava: Path, implementation: str) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
    processor.tokenizer.padding_side = "left"
    model = load_whole(tiny_llava, "float32")
    model.set_attn_implementation(implementation)
    images = {name: Image.new("RGB", (40, 30), name) for name in ("red", "blue")}
    asked = [("red", "what is it"), ("blue", "what is it"), ("red", "what is left of the thing"), ("red", ""), ("", "no image")]
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    prompts, expected = [], []
    with torch.inference_mode():
        for name, text in asked:
            rendered = f"USER: {'<image>' if name else ''}\n{text} ASSISTANT:"
            inputs = processor(text=rendered, images=images.get(name), return_tensors="pt")
            expected.append(model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :])
            pixels = inputs.get("pixel_values")
            features = [] if pixels is None else list(model.get_image_features(pixel_values=pixels).pooler_output)
            prompts.append(Prompt(inputs["input_ids"][0].tolist(), (name,) if name else (), features))
        read: list[torch.Size] = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda layer, inputs: read.append(inputs[0].shape)
        )
        tokens = generate(model, processor.tokenizer, prompts, **settings)
        handle.remove()
    assert torch.equal(tokens, torch.stack(expected)) and len({tuple(row.tolist()) for row in tokens}) > 2
    (members, lengths), longest = split_prompts(prompts, model.config.image_token_id), max(len(each.ids) for each in prompts)
    rest = max(len(prompts[n].ids) - length for numbers, length in zip(members, lengths, strict=True) for n in numbers)
    assert [shape[:2] for shape in read[:3]] == [(3, max(lengths)), (5, rest), (5, 1)]
    assert 3 * max(lengths) + 5 * rest < 5 * longest
