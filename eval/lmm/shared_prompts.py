"""Greedy answers to prompts that begin alike: what several of a batch have in common goes through the language model once.

Benchmarks ask several things of an image: MMBench one question with its options rotated, POPE, MME and GQA several questions.
The image's tokens, most of a prompt, then stand at the beginning of each. In: token ids and the features of the images. Out:
the new tokens, in float32 those of prompts answered one by one. Keys and values of the common beginnings are computed as a
batch of their own and repeated for their prompts, whose rests follow. A model with layers that attend to a window only, or keep
a state instead of keys, reads every prompt whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, DynamicCache
from transformers.cache_utils import DynamicLayer


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
    """
    alike: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        alike[prompt.images + tuple(prompt.ids[: _end_of_images(prompt, image_id)])].append(number)
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
    image_id, cache = model.config.image_token_id, DynamicCache(config=model.config.text_config)
    members, lengths = split_prompts(prompts, image_id)
    # A layer that looks back over a window, or keeps a state, would meet the padding between beginnings and rests.
    takes_padding = all(type(layer) is DynamicLayer for layer in cache.layers)
    end_in_text = all(_end_of_images(prompt, image_id) < len(prompt.ids) for prompt in prompts)
    if takes_padding and end_in_text and len(members) < len(prompts) and any(lengths):
        return _generate_shared(model, tokenizer, prompts, members, lengths, cache, settings)
    whole = _pad(tokenizer, [prompt.ids for prompt in prompts], model.device)
    embeds_BTD = _embed(model, whole["input_ids"], prompts)
    new_BT: torch.Tensor = model.generate(inputs_embeds=embeds_BTD, attention_mask=whole["attention_mask"], **settings)
    return new_BT


def _generate_shared(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    members: list[list[int]],
    lengths: list[int],
    cache: DynamicCache,
    settings: dict[str, Any],
) -> torch.Tensor:
    firsts = [prompts[numbers[0]] for numbers in members]
    begun = _pad(tokenizer, [first.ids[:length] for first, length in zip(firsts, lengths, strict=True)], model.device)
    model.model.language_model(
        inputs_embeds=_embed(model, begun["input_ids"], firsts),
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
    both = {key: torch.cat([begun[key][places], rests[key]], 1) for key in ("input_ids", "attention_mask")}
    tokens_BT = model.generate(**both, past_key_values=cache, **settings)
    return tokens_BT[:, both["input_ids"].shape[1] :]


def _end_of_images(prompt: Prompt, image_id: int) -> int:
    """The place after the last token of an image; 0 where there is none."""
    return next((place for place in range(len(prompt.ids), 0, -1) if prompt.ids[place - 1] == image_id), 0)


def _pad(tokenizer: Any, ids: list[list[int]], device: torch.device) -> BatchEncoding:
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)


def _embed(model: Any, ids_BT: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    if features := [each for prompt in prompts for each in prompt.features]:
        is_image_BT1 = (ids_BT == model.config.image_token_id).unsqueeze(-1)
        embeds_BTD = embeds_BTD.masked_scatter(is_image_BT1, torch.cat(features).to(embeds_BTD.dtype))
    return embeds_BTD
