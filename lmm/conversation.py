"""From a LLaVA conversation to token ids and labels, by whatever chat template: one path for all of them.

In: a row of a LLaVA JSON file and a tokenizer with a Jinja template. Out: input_ids and labels; only answers are supervised.
The supervised text is found by rendering the conversation up to each answer and up to its end, so that no template needs
code of its own. What cannot be trained on raises SampleFault, which the caller counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lift.common.errors import UserError
from lmm.faults import SampleFault
from lmm.images import FolderImages, ImageReference, ImageStore, StoredImage

IMAGE_MARKER = "<image>"
IGNORED_LABEL = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, str]]
    """`role` (system, user, assistant) and `content`, in which `<image>` marks where an image stands."""
    images: list[ImageReference]
    """In the order of their markers."""


class Tokens(NamedTuple):
    input_ids: list[int]
    labels: list[int]


def parse_row(row: Any, images: ImageStore | Path | None) -> Conversation:
    """Checks one row. A turn's single `<image>` moves to its front, as in LLaVA and as in inference prompts.

    Args:
        row: LLaVA's form (`conversations` with `from`, `value`; `image`) or that of chat datasets (`messages` with `role`,
            `content`, which is text or a list of parts; `images`).
        images: where the images that the row names are, or the folder that holds them; None when there is no such place.

    Raises:
        SampleFault: malformed row, unknown or misplaced role, empty answer, `<image>` count that differs from the images.
    """
    turns = row.get("conversations", row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise SampleFault("malformed row", "expected an object with a non-empty list `conversations` or `messages`")
    messages = []
    for turn in turns:
        role, text = _turn(turn)
        if not isinstance(role, str) or role not in ROLES:
            raise SampleFault("unknown role", repr(role))
        messages.append({"role": ROLES[role], "content": text})
    _check_order(messages)
    markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    found = _images_of(row, FolderImages(images) if isinstance(images, Path) else images)
    if markers != len(found):
        raise SampleFault("image count", f"{markers} {IMAGE_MARKER} in the text, {len(found)} images")
    move_single_markers(messages)
    return Conversation(messages, found)


def move_single_markers(messages: list[dict[str, str]]) -> None:
    """Puts a message's single `<image>` at its front, in place, as LLaVA does."""
    for message in messages:
        if message["content"].count(IMAGE_MARKER) == 1:
            rest = message["content"].replace(IMAGE_MARKER, "").strip()
            message["content"] = f"{IMAGE_MARKER}\n{rest}".strip()


def _turn(turn: Any) -> tuple[Any, str]:
    """Role and text of a turn in either form."""
    if not isinstance(turn, dict):
        raise SampleFault("malformed row", "expected turns with `from` and a text `value`, or `role` and `content`")
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = "".join(map(part_text, content))
    if not isinstance(content, str):
        raise SampleFault("malformed row", "expected turns with `from` and a text `value`, or `role` and `content`")
    return turn.get("from", turn.get("role")), content


def part_text(part: Any) -> str:
    """Of one part of a message's content; `<image>` for an image. Raises SampleFault for a part of another kind."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return f"{IMAGE_MARKER}\n"
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise SampleFault("unknown content part", f"expected parts of type `text` or `image`, found {str(part)[:80]!r}")


def _check_order(messages: list[dict[str, str]]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[0]["role"] != "user":
        raise SampleFault("starts with an answer" if turns and turns[0]["role"] == "assistant" else "no question")
    check_turns(turns)
    for number, message in enumerate(turns):
        if message["role"] == "assistant" and not message["content"].strip():
            raise SampleFault("empty answer", f"turn {number}")
    if len(turns) == 1:
        raise SampleFault("no answer")


def check_turns(turns: list[dict[str, str]]) -> None:
    """Raises SampleFault unless questions and answers alternate and no answer has an image."""
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise SampleFault("roles do not alternate", f"turn {number} is by '{message['role']}'")
        if message["role"] == "assistant" and IMAGE_MARKER in message["content"]:
            raise SampleFault("image in an answer", f"turn {number}")


def _images_of(row: dict[str, Any], images: ImageStore | None) -> list[ImageReference]:
    value = row.get("images") if row.get("image") is None else row["image"]
    named = [] if value is None else value if isinstance(value, list) else [value]
    return [_image_reference(name, images) for name in named]


def _image_reference(value: Any, images: ImageStore | None) -> ImageReference:
    if isinstance(value, dict):  # as `datasets` stores an image
        if isinstance(value.get("bytes"), bytes) and value["bytes"]:
            return StoredImage(str(value.get("path") or "image in the row"), value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise SampleFault("malformed row", "expected an image as a relative path, or its bytes, or a list of them")
    if images is None:
        raise SampleFault("no image folder", "the row names an image, but its source names no folder or tar `images`")
    return images.find(value)


def load_template(name: str) -> str:
    """Text of a template shipped in `lmm/chat_templates`."""
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


class ConversationEncoder:
    """Turns messages into token ids and labels.

    Args:
        tokenizer: a fast tokenizer (offsets are needed) that has `image_token` as one token.
        template: Jinja text of the chat template; `template_name` is used in messages.
        tokens_per_image: number of features, hence of image tokens, per image.
        max_length: longest sample in tokens, image tokens included.
        cuts: a longer sample is cut there, as the original LLaVA does, unless an image would go with it; else it is a fault.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        template_name: str,
        image_token: str,
        tokens_per_image: int,
        max_length: int,
        cuts: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.template_name = template_name
        self.image_text = image_token * tokens_per_image
        self.image_token = image_token
        self.image_id = tokenizer.convert_tokens_to_ids(image_token)
        self.max_length, self.cuts = max_length, cuts
        probe = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "PROBE"}]
        self.content_as_parts = "PROBE" not in self._apply(probe, add_generation_prompt=False)

    def encode(self, messages: list[dict[str, str]]) -> Tokens:
        """Ids of the whole conversation, and labels that are -100 except on the tokens of answers and their end-of-turn marks.

        Raises:
            SampleFault: the template refuses the conversation, nothing is supervised, or what `fit` says.
            UserError: the template rewrites earlier turns, so that answers cannot be told from the rest.
        """
        return self.fit(self.tokens(messages))

    def fit(self, tokens: Tokens) -> Tokens:
        """The first max_length tokens.

        Raises:
            SampleFault: there are more, and cutting was not asked for, or would take an image or every answer away.
        """
        ids, labels = tokens.input_ids, tokens.labels
        if len(ids) <= self.max_length:
            return tokens
        kept, kept_labels = ids[: self.max_length], labels[: self.max_length]
        reason = ""
        if self.cuts and self.image_id in ids[self.max_length :]:
            reason = ", with an image beyond max_length"
        elif self.cuts and all(label == IGNORED_LABEL for label in kept_labels):
            reason = ", with no answer within max_length"
        if reason or not self.cuts:
            raise SampleFault("longer than max_length", f"{len(ids)} tokens{reason}")
        return Tokens(kept, kept_labels)

    def tokens(self, messages: list[dict[str, str]]) -> Tokens:
        """As `encode`, however long the conversation is."""
        text, spans = self.render(messages)
        input_ids, offsets = self.tokenize(text)
        supervised = [any(begin < stop and end > start for start, stop in spans) for begin, end in offsets]
        if not any(supervised):
            raise SampleFault("nothing supervised")
        return Tokens(input_ids, [i if used else IGNORED_LABEL for i, used in zip(input_ids, supervised, strict=True)])

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the rendered text, and the characters [start, stop) that each stands for."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SampleFault("text that is no Unicode", str(error)) from error
        begins_special = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        encoding = self.tokenizer(
            text, add_special_tokens=not begins_special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids up to where the next answer starts, as training sees them before an answer, of whatever length.

        Raises:
            SampleFault: the template refuses the conversation.
        """
        return self.tokenize(self._expanded(messages, add_generation_prompt=True))[0]

    def render(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Text with images expanded to their tokens, and the character spans [start, stop) of the supervised parts."""
        text = self._expanded(messages)
        markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
        if text.count(self.image_token) * len(self.image_token) != markers * len(self.image_text):
            raise SampleFault("image tokens", f"{markers} images, other numbers of {self.image_token} in the rendered text")
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._expanded(messages[:number], add_generation_prompt=True)
                turn = self._expanded(messages[: number + 1])
                if not (turn.startswith(prompt) and text.startswith(turn)):
                    raise UserError(
                        f"chat template '{self.template_name}': expected the text up to an answer to be the start of the whole "
                        f"text, found otherwise at message {number}. The template rewrites earlier turns; train with "
                        "--template vicuna_v1, or give a template that does not."
                    )
                spans.append((len(prompt), len(turn)))
        return text, spans

    def _expanded(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            text = self._apply(messages, add_generation_prompt)
        except (TemplateError, TypeError) as error:
            raise SampleFault("refused by the template", str(error)) from error
        return text.replace(IMAGE_MARKER, self.image_token).replace(self.image_token, self.image_text)

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        content: list[dict[str, Any]] = list(messages)
        if getattr(self, "content_as_parts", False):
            content = [{"role": message["role"], "content": _parts(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(
            content, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def _parts(text: str) -> list[dict[str, str]]:
    """`text` as the list of parts that templates of multimodal models take."""
    pieces = text.split(IMAGE_MARKER)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
