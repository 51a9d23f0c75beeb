"""A conversation as it grows, in the terminal or on a page: messages and images, as the chat template takes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from PIL import Image

from lift.common.errors import UserError
from lmm.conversation import IMAGE_MARKER, SampleFault
from lmm.inference import Llava, Question

MAX_CHARACTERS = 20_000
"""Longer questions are refused before they are tokenised."""

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Dialogue:
    """Immutable: a question that fails leaves the conversation as it was."""

    messages: tuple[dict[str, str], ...] = ()
    images: tuple[Image.Image, ...] = ()

    @property
    def waits_for_answer(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def with_question(self, text: str, images: list[Image.Image]) -> Dialogue:
        """Images stand before the question's text, as in training.

        Raises:
            UserError: no text, far too long a one, or one that holds the image marker.
        """
        text = text.strip()
        if not text:
            raise UserError("expected a question, found no text.")
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"expected a question of at most {MAX_CHARACTERS} characters, found {len(text)}.")
        if IMAGE_MARKER in text:
            raise UserError(f"a question may not hold {IMAGE_MARKER}; images are added beside the text.")
        content = f"{IMAGE_MARKER}\n" * len(images) + text
        return Dialogue((*self.messages, {"role": "user", "content": content}), (*self.images, *images))

    def with_answer(self, text: str) -> Dialogue:
        return Dialogue((*self.messages, {"role": "assistant", "content": text.strip().replace(IMAGE_MARKER, "")}), self.images)

    def prompt(self, model: Llava, max_new_tokens: int) -> Question:
        """Raises UserError when the conversation is too long for `model`, or its template refuses it."""
        try:
            return model.question(list(self.messages), list(self.images), max_new_tokens)
        except SampleFault as fault:
            raise UserError(f"the conversation cannot go on: {fault.cause}: {fault.detail}.") from fault


def printable(text: str) -> str:
    """`text` without what steers a terminal or turns the direction of writing: an answer is not to be trusted."""
    return _CONTROL_CHARACTERS.sub("", text)
