"""`lmm inspect-mask`: samples as training sees them, with what is supervised made visible.

In: a recipe, or a file with a tokenizer and a template. Out: on standard output the text with the supervised tokens in colour
(in brackets where there is no terminal), or one JSON object a sample.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmm.conversation import IGNORED_LABEL, IMAGE_MARKER, ConversationEncoder, parse_row
from lmm.faults import SampleFault
from lmm.recipes import open_choice
from lmm.rows import Row
from lmm.settings import InspectMaskSettings

SHOWN = 5
COLOUR = ("\x1b[32m", "\x1b[0m")
BRACKETS = ("[[", "]]")


class Masked(NamedTuple):
    input_ids: list[int]
    """One placeholder for each image."""
    labels: list[int]
    text: str
    """The rendered text; images stand for as many tokens as in training."""
    spans: list[tuple[int, int]]
    """Characters [start, stop) of each run of supervised tokens."""
    images: int


def inspect_mask(settings: InspectMaskSettings) -> None:
    """Prints the samples. Raises UserError as `lmm train` would for the same data."""
    tokens_per_image = 1 if settings.data is not None else None
    choice = open_choice(settings, tokens_per_image, read_images=False)
    assert choice.encoder is not None  # the settings ask for a tokenizer
    count = settings.n or (len(choice.rows) if settings.json else SHOWN)
    for number in range(min(count, len(choice.rows))):
        row = choice.rows[number]
        print(json_line(row, number, choice.encoder) if settings.json else _shown(row, choice.encoder))


def mask_row(row: Row, encoder: ConversationEncoder) -> Masked:
    """Raises SampleFault when the sample cannot be used. Images are counted, not read."""
    conversation = parse_row(row.value, row.image_store)
    text, _ = encoder.render(conversation.messages)
    tokens = encoder.encode(conversation.messages)
    _, offsets = encoder.tokenize(text)
    spans: list[tuple[int, int]] = []
    before = IGNORED_LABEL
    for label, (start, stop) in zip(tokens.labels, offsets[: len(tokens.labels)], strict=True):
        if label != IGNORED_LABEL:
            spans = [*spans[:-1], (spans[-1][0], stop)] if before != IGNORED_LABEL else [*spans, (start, stop)]
        before = label
    kept = list(_one_per_image(tokens.input_ids, encoder))
    return Masked(
        [tokens.input_ids[place] for place in kept],
        [tokens.labels[place] for place in kept],
        text,
        spans,
        len(conversation.images),
    )


def _one_per_image(input_ids: list[int], encoder: ConversationEncoder) -> Iterator[int]:
    """Positions of all tokens, of an image's that of the first."""
    tokens_per_image = len(encoder.image_text) // len(encoder.image_token)
    left = 0
    for place, token in enumerate(input_ids):
        if token != encoder.image_id:
            yield place
        elif left == 0:
            yield place
            left = tokens_per_image - 1
        else:
            left -= 1


def json_line(row: Row, number: int, encoder: ConversationEncoder) -> str:
    """The JSON object of one sample; its `id` is that of the row, or its number where it has none."""
    name = row.value.get("id", number) if isinstance(row.value, dict) else number
    value: dict[str, Any] = {"id": name}
    try:
        masked = mask_row(row, encoder)
    except SampleFault as fault:
        return json.dumps(value | {"dropped": fault.cause, "detail": fault.detail}, ensure_ascii=False, default=str)
    supervised = [masked.text[start:stop] for start, stop in masked.spans]
    value |= {"input_ids": masked.input_ids, "labels": masked.labels, "supervised": supervised}
    return json.dumps(value, ensure_ascii=False, default=str)


def _shown(row: Row, encoder: ConversationEncoder) -> str:
    try:
        masked = mask_row(row, encoder)
    except SampleFault as fault:
        return f"--- {visible(row.key)}: dropped, {fault.cause} ({visible(fault.detail)})\n"
    supervised = sum(label != IGNORED_LABEL for label in masked.labels)
    title = f"--- {visible(row.key)}: {len(masked.input_ids)} tokens with one for each image, {supervised} supervised, "
    begin, end = COLOUR if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else BRACKETS
    pieces, done = [], 0
    for start, stop in masked.spans:
        pieces += [visible(masked.text[done:start]), begin, visible(masked.text[start:stop]), end]
        done = stop
    text = "".join([*pieces, visible(masked.text[done:])])
    return f"{title}{masked.images} images\n{text.replace(encoder.image_text, IMAGE_MARKER)}\n"


def visible(text: str) -> str:
    """Without characters that would steer the terminal: they are shown by their number."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
