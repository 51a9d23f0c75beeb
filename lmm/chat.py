"""`lmm chat`: a conversation with a LLaVA model in the terminal, or with questions from a pipe, one a line.

The answer appears as it grows; Ctrl-C stops it and the conversation goes on with what was said so far.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from PIL import Image

from lift.common.errors import UserError
from lift.common.images import ImageFault, decode_image
from lmm.dialogue import Dialogue, printable
from lmm.inference import Decoding, Llava
from lmm.settings import ChatSettings

HELP = "/image FILE adds an image to the next question, /reset starts anew, /quit leaves, Ctrl-C stops an answer."


def chat(settings: ChatSettings) -> None:
    """Command `lmm chat`. Raises UserError for an unusable model or image; with questions from a pipe, for any fault."""
    first = [] if settings.image is None else [load_image(settings.image)]
    model = Llava(settings.model, settings.dtype, settings.device)
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.seed)
    Chat(model, decoding, sys.stdout, interactive=sys.stdin.isatty()).run(read_lines(sys.stdin), first)


def load_image(path: Path) -> Image.Image:
    """RGB image, wholly decoded. Raises UserError when it cannot be."""
    try:
        return decode_image(path.expanduser())
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected an image, but there is no such file. Check the path.") from error
    except ImageFault as error:
        raise UserError(f"{path}: the image cannot be decoded: {error}") from error


def read_lines(source: TextIO) -> Iterator[str]:
    """Lines without their ends. From a terminal with a prompt and, where Python has it, line editing."""
    if not source.isatty():
        yield from (line.rstrip("\n") for line in source)
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # its import alone gives `input` a history and editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


class Chat:
    """The conversation and its commands.

    Args:
        out: where answers and messages go.
        interactive: a fault is told and the chat goes on; otherwise nobody is there to react, and it is raised.
    """

    def __init__(self, model: Llava, decoding: Decoding, out: TextIO, interactive: bool) -> None:
        self.model, self.decoding, self.out, self.interactive = model, decoding, out, interactive
        self.dialogue = Dialogue()
        self.images: list[Image.Image] = []

    def run(self, lines: Iterator[str], images: list[Image.Image]) -> None:
        """Until `/quit` or the end of `lines`. `images` belong to the first question."""
        self.images = list(images)
        self._tell(f"{self.model.folder} on {self.model.device}. {HELP}")
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self._take(line.strip())
            except UserError as error:
                if not self.interactive:
                    raise
                self._tell(str(error))

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not line:
            return
        if command == "/image":
            self._add_image(argument.strip().strip("'\""))
        elif command == "/reset":
            self.dialogue, self.images = Dialogue(), []
            self._tell("A new conversation.")
        elif command == "/help":
            self._tell(HELP)
        elif command.startswith("/"):
            raise UserError(f"{printable(command)}: unknown command. {HELP}")
        else:
            self._ask(line)

    def _add_image(self, name: str) -> None:
        if not name:
            raise UserError("/image: expected a file after it.")
        image = load_image(Path(name))
        self.images.append(image)
        self._tell(f"{printable(name)}: {image.width} x {image.height}; ask about it.")

    def _ask(self, text: str) -> None:
        asked = self.dialogue.with_question(text, self.images)
        try:
            prompt = asked.prompt(self.model, self.decoding.max_new_tokens)
        except UserError as error:
            raise UserError(f"{error} /reset starts a new one.") from error
        answer, pieces = "", self.model.stream(prompt, self.decoding)
        try:
            for piece in pieces:
                answer += piece
                self.out.write(printable(piece))
                self.out.flush()
        except KeyboardInterrupt:
            pieces.close()
            self.out.write(" [stopped]")
        self.out.write("\n")
        self.out.flush()
        if answer.strip():
            self.dialogue, self.images = asked.with_answer(answer), []

    def _tell(self, message: str) -> None:
        """Only to a person: what goes into a pipe are the answers."""
        if self.interactive:
            self.out.write(f"{message}\n")
            self.out.flush()
