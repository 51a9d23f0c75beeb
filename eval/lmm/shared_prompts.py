"""Greedy answers to prompts that begin alike: what several of a batch have in common goes through the language model once.

Benchmarks ask several things of an image: MMBench one question with its options rotated, POPE, MME and GQA several questions.
The image's tokens, most of a prompt, then stand at the beginning of each. In: token ids and the features of the images. Out:
the new tokens, in float32 those of prompts answered one by one. Keys and values of the common beginnings are computed as a
batch of their own and repeated for their prompts, whose rests follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, DynamicCache


class Prompt(NamedTuple):
    ids: list[int]
    """Token ids; an image takes as many places as it has features."""
    images: tuple[Hashable, ...]
    """What tells its images from others. Equal tokens of other images are not shared."""
    features: list[torch.Tensor]
    """[tokens, width] of each image."""


def split_prompts(prompts: Sequence[Prompt], image_id: int) -> tuple[list[list[int]], list[int]]:
    """The numbers of the prompts that share a beginning, and how many tokens of it belong to it.

    A beginning holds every image of its prompts, so that the rests are text, and leaves each prompt at least one token. Prompts
    that differ before the end of their images share nothing.

    Raises:
        ValueError: an image is the last thing of a prompt.
    """
    alike: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        text_at_end = next((n for n, token in enumerate(reversed(prompt.ids)) if token == image_id), len(prompt.ids))
        if text_at_end == 0:
            raise ValueError("a prompt ends with an image: its chat template has no beginning of an answer")
        up_to_images = tuple(prompt.ids[: len(prompt.ids) - text_at_end])
        alike[prompt.images + up_to_images].append(number)
    members = list(alike.values())
    lengths = []
    for numbers in members:
        ids = [prompts[number].ids for number in numbers]
        shortest = min(map(len, ids))
        lengths.append(next((n for n, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), shortest - 1))
    return members, lengths


def generate(model: Any, tokenizer: Any, prompts: Sequence[Prompt], **settings: Any) -> torch.Tensor:
    """New token ids [batch, new tokens] of `model.generate`.

    Args:
        model: LlavaForConditionalGeneration.
        tokenizer: pads on the left.
        settings: further arguments of `model.generate`.
    """
    members, lengths = split_prompts(prompts, model.config.image_token_id)
    firsts = [prompts[numbers[0]] for numbers in members]
    begun = _pad(tokenizer, [first.ids[:length] for first, length in zip(firsts, lengths, strict=True)], model.device)
    cache = DynamicCache(config=model.config.text_config)
    model.model.language_model(
        inputs_embeds=_embed(model, begun["input_ids"], [each for first in firsts for each in first.features]),
        attention_mask=begun["attention_mask"],
        position_ids=(begun["attention_mask"].cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    beginning_of = {number: place for place, numbers in enumerate(members) for number in numbers}
    places = [beginning_of[number] for number in range(len(prompts))]
    cache.batch_select_indices(torch.tensor(places, device=model.device))
    rests = _pad(tokenizer, [prompt.ids[lengths[place] :] for prompt, place in zip(prompts, places, strict=True)], model.device)
    # Where beginnings or rests differ in length there is padding in the middle; positions are counted by the mask.
    whole = {key: torch.cat([begun[key][places], rests[key]], 1) for key in ("input_ids", "attention_mask")}
    tokens_BT = model.generate(**whole, past_key_values=cache, **settings)
    return tokens_BT[:, whole["input_ids"].shape[1] :]


def _pad(tokenizer: Any, ids: list[list[int]], device: torch.device) -> BatchEncoding:
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)


def _embed(model: Any, ids_BT: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    if features:
        is_image_BT1 = (ids_BT == model.config.image_token_id).unsqueeze(-1)
        embeds_BTD = embeds_BTD.masked_scatter(is_image_BT1, torch.cat(features).to(embeds_BTD.dtype))
    return embeds_BTD
