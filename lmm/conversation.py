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

IMAGE_MARKER = "<image>"
IGNORED_LABEL = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"


class SampleFault(Exception):
    """Why one sample cannot be used: `cause` is counted, `detail` is for the reader of the ledger."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, str]]
    """`role` (system, user, assistant) and `content`, in which `<image>` marks where an image stands."""
    images: list[Path]


class Tokens(NamedTuple):
    input_ids: list[int]
    labels: list[int]


def parse_row(row: Any, images_folder: Path | None) -> Conversation:
    """Checks one row of a LLaVA file. A turn's single `<image>` moves to its front, as in LLaVA and as in inference prompts.

    Raises:
        SampleFault: malformed row, unknown or misplaced role, empty answer, `<image>` count that differs from the images.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise SampleFault("malformed row", "expected an object with a non-empty list `conversations`")
    messages = []
    for turn in row["conversations"]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SampleFault("malformed row", "expected turns with `from` and a text `value`")
        if turn.get("from") not in ROLES:
            raise SampleFault("unknown role", repr(turn.get("from")))
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    _check_order(messages)
    images = _image_paths(row.get("image"), images_folder)
    markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    if markers != len(images):
        raise SampleFault("image count", f"{markers} {IMAGE_MARKER} in the text, {len(images)} images")
    for message in messages:
        if message["content"].count(IMAGE_MARKER) == 1:
            rest = message["content"].replace(IMAGE_MARKER, "").strip()
            message["content"] = f"{IMAGE_MARKER}\n{rest}".strip()
    return Conversation(messages, images)


def _check_order(messages: list[dict[str, str]]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[0]["role"] != "user":
        raise SampleFault("starts with an answer" if turns and turns[0]["role"] == "assistant" else "no question")
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise SampleFault("roles do not alternate", f"turn {number} is by '{message['role']}'")
        if message["role"] == "assistant":
            if not message["content"].strip():
                raise SampleFault("empty answer", f"turn {number}")
            if IMAGE_MARKER in message["content"]:
                raise SampleFault("image in an answer", f"turn {number}")
    if len(turns) == 1:
        raise SampleFault("no answer")


def _image_paths(value: Any, folder: Path | None) -> list[Path]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if names and folder is None:
        raise SampleFault("no image folder", "the row has an image, but its source names no folder `images`")
    paths = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise SampleFault("malformed row", "expected `image` to be a relative path or a list of them")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise SampleFault("image outside its folder", name)
        paths.append(Path(folder or "", name))
    return paths


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
    """

    def __init__(
        self, tokenizer: Any, template: str, template_name: str, image_token: str, tokens_per_image: int, max_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.template_name = template_name
        self.image_text = image_token * tokens_per_image
        self.image_token = image_token
        self.max_length = max_length
        probe = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "PROBE"}]
        self.content_as_parts = "PROBE" not in self._apply(probe, add_generation_prompt=False)

    def encode(self, messages: list[dict[str, str]]) -> Tokens:
        """Ids of the whole conversation, and labels that are -100 except on the tokens of answers and their end-of-turn marks.

        Raises:
            SampleFault: the template refuses the conversation, nothing is supervised, or it is longer than max_length.
            UserError: the template rewrites earlier turns, so that answers cannot be told from the rest.
        """
        text, spans = self.render(messages)
        begins_special = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        encoding = self.tokenizer(
            text, add_special_tokens=not begins_special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        input_ids = encoding["input_ids"]
        if len(input_ids) > self.max_length:
            raise SampleFault("longer than max_length", f"{len(input_ids)} tokens")
        supervised = [any(begin < stop and end > start for start, stop in spans) for begin, end in encoding["offset_mapping"]]
        if not any(supervised):
            raise SampleFault("nothing supervised")
        return Tokens(input_ids, [i if used else IGNORED_LABEL for i, used in zip(input_ids, supervised, strict=True)])

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids up to where the next answer starts, as training sees them before an answer, of whatever length.

        Raises:
            SampleFault: the template refuses the conversation.
        """
        text = self._expanded(messages, add_generation_prompt=True)
        begins_special = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begins_special, verbose=False)["input_ids"]

    def render(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Text with images expanded to their tokens, and the character spans [start, stop) of the supervised parts."""
        text = self._expanded(messages)
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
