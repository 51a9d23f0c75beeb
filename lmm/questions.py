"""Question files: each row becomes messages and image paths, or a fault with its cause.

In: JSON lines in the form of the original LLaVA (`question_id`, `image`, `text`) or with `messages`. Out: rows that can be
answered, in order, with what is wrong with the others in the drop ledger.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.files import read_jsonl, require_folder
from lift.common.images import ImageFault, decode_image, image_fault
from lift.common.ledger import DropLedger
from lmm.conversation import IMAGE_MARKER, SampleFault, check_turns, move_single_markers, part_text

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class QuestionRow:
    """One question; `messages` end with the user's."""

    question_id: Any
    messages: list[dict[str, str]]
    """`role` and `content`, in which `<image>` marks where each of `images` stands."""
    images: list[Path]

    @property
    def key(self) -> str:
        return str(self.question_id)


def read_questions(path: Path, images: Path | None, ledger: DropLedger) -> list[QuestionRow]:
    """The rows whose text is whole; the others are entered in `ledger`.

    Raises:
        UserError: no file, no JSON lines, no row, or an id that is missing or occurs twice.
    """
    values = read_jsonl(path, "questions")
    if not values:
        raise UserError(f"{path}: expected questions, one JSON object a line, found none.")
    if images is not None:
        require_folder(images, f"the images of {path.name}")
    rows: list[QuestionRow] = []
    seen: dict[str, int] = {}
    for number, value in enumerate(values, start=1):
        name = _question_id(value, f"{path}: row {number}")
        if str(name) in seen:
            raise UserError(
                f"{path}: row {number}: question_id {name!r} is that of row {seen[str(name)]} too. "
                "Answers are matched by it; give each row its own."
            )
        seen[str(name)] = number
        try:
            rows.append(parse_question(value, name, images))
        except SampleFault as fault:
            ledger.drop(str(name), fault.cause, fault.detail)
    return rows


def parse_question(value: dict[str, Any], question_id: Any, folder: Path | None) -> QuestionRow:
    """One row. A message's single `<image>` moves to its front, as in training; a text without one gets the images before it.

    Raises:
        SampleFault: no text, unknown or misplaced role, an image outside `folder`, or `<image>` count that differs.
    """
    names, messages = _names(value), []
    if "messages" in value:
        if not isinstance(value["messages"], list) or not value["messages"]:
            raise SampleFault("malformed row", "expected `messages` to be a non-empty list")
        for message in value["messages"]:
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ROLES:
                raise SampleFault("unknown role", repr(role))
            text, more = _content(message.get("content"))
            messages.append({"role": role, "content": text})
            names += more
        _check_order(messages)
    else:
        question = value.get("text")
        if not isinstance(question, str) or not question.replace(IMAGE_MARKER, "").strip():
            raise SampleFault("no text", "expected `text` (or `messages`) with a question")
        messages.append({"role": "user", "content": question})
    markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    last = messages[-1]
    if markers == 0 and names:
        last["content"] = f"{IMAGE_MARKER}\n" * len(names) + last["content"]
    elif markers != len(names):
        raise SampleFault("image count", f"{markers} {IMAGE_MARKER} in the text, {len(names)} images")
    move_single_markers(messages)
    return QuestionRow(question_id, messages, [_inside(name, folder) for name in names])


def check_images(rows: list[QuestionRow], ledger: DropLedger, workers: int) -> list[QuestionRow]:
    """Decodes every image once, before a model has worked for hours. Rows with a bad one are entered in `ledger`."""
    paths = sorted({path for row in rows for path in row.images})
    with ThreadPoolExecutor(workers) as pool:
        found = list(tqdm(pool.map(_fault, paths), total=len(paths), desc="check images", unit="image", disable=not paths))
    faults = {path: fault for path, fault in zip(paths, found, strict=True) if fault is not None}
    good = []
    for row in rows:
        bad = [path for path in row.images if path in faults]
        if bad:
            ledger.drop(row.key, faults[bad[0]][0], f"{bad[0]}: {faults[bad[0]][1]}")
        else:
            good.append(row)
    return good


def _fault(path: Path) -> tuple[str, str] | None:
    try:
        decode_image(path)
    except (OSError, ImageFault) as error:
        return image_fault(error)
    except ValueError as error:  # no file can have that name
        return "missing image", str(error)
    return None


def _question_id(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with `question_id` and `text`, found {type(value).__name__}.")
    name = value.get("question_id", value.get("id"))
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise UserError(f"{where}: expected a `question_id` (text or whole number), found {name!r}. Answers are matched by it.")
    if not str(name).isprintable():
        raise UserError(f"{where}: expected a `question_id` of printable characters, found {name!r}.")
    return name


def _names(value: dict[str, Any]) -> list[str]:
    """Images that the row itself names, under `image` or `images`, as one path or a list."""
    names = value.get("images", value.get("image"))
    return [] if names is None else list(names) if isinstance(names, list) else [names]


def _content(content: Any) -> tuple[str, list[str]]:
    """Text with markers, and the images that parts name themselves."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise SampleFault("no text", "expected `content` to be text or a list of parts")
    text = "".join(map(part_text, content))
    return text, [part["image"] for part in content if part["type"] == "image" and "image" in part]


def _check_order(messages: list[dict[str, str]]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    check_turns(turns)
    if not turns or turns[-1]["role"] != "user":
        raise SampleFault("no question", "expected the last message to be the user's")
    if not turns[-1]["content"].replace(IMAGE_MARKER, "").strip():
        raise SampleFault("no text", "the last message has no text")


def _inside(name: Any, folder: Path | None) -> Path:
    if not isinstance(name, str) or not name:
        raise SampleFault("malformed row", "expected images to be relative paths")
    if folder is None:
        raise SampleFault("no image folder", f"the row names {name}; give --images FOLDER")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SampleFault("image outside its folder", name)
    return folder / name
