"""`lmm chat`: answers stream, turns build on each other through the model's own template, and a fault leaves the talk whole."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image
from scripted_llava import make_scripted_llava

from lift.common.errors import UserError
from lmm.__main__ import main
from lmm.chat import Chat, read_lines
from lmm.dialogue import Dialogue, printable
from lmm.inference import Decoding, Llava

PIECES = ["It is ", "red", ", \x1b[2Jsurely."]
ANSWER = "It is red, \x1b[2Jsurely."
SHOWN = "It is red, [2Jsurely."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted_llava(tmp_path_factory.mktemp("chat") / "scripted", PIECES)


@pytest.fixture(scope="module")
def model(folder: Path) -> Llava:
    return Llava(folder, device="cpu")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "a red picture.png"
    Image.new("RGB", (50, 40), "red").save(path)
    return path


def _talk(model: Llava, lines: list[str], interactive: bool = True, out: io.StringIO | None = None, longest: int = 20) -> Chat:
    chat = Chat(model, Decoding(longest), out or io.StringIO(), interactive)
    chat.run(iter(lines), [])
    return chat


def test_turns_are_templated_by_the_models_own_template(model: Llava, red: Path) -> None:
    chat = _talk(
        model, ["Hello?", f"/image '{red}'", "  Which colour? ", "", "/image " + str(red), f"/image {red}", "And these?"]
    )
    roles = [message["role"] for message in chat.dialogue.messages]
    assert roles == ["user", "assistant"] * 3 and len(chat.dialogue.images) == 3 and chat.images == []
    asked = Dialogue(chat.dialogue.messages[:-1], chat.dialogue.images)
    text = model.processor.tokenizer.decode(asked.prompt(model, 20).input_ids)
    image = "<image>" * 16
    assert text == (
        f"USER: Hello? ASSISTANT: {ANSWER}<eos>USER: {image}\nWhich colour? ASSISTANT: {ANSWER}<eos>"
        f"USER: {image}\n{image}\nAnd these? ASSISTANT:"
    )
    assert isinstance(chat.out, io.StringIO) and chat.out.getvalue().count(SHOWN) == 3 and "\x1b" not in chat.out.getvalue()
    assert "50 x 40" in chat.out.getvalue()


def test_the_answer_streams_and_equals_the_one_in_a_batch(model: Llava) -> None:
    question = Dialogue().with_question("Which colour?", []).prompt(model, 20)
    pieces = list(model.stream(question, Decoding(20)))
    assert len(pieces) >= 3 and "".join(pieces) == ANSWER == model.answer([question], Decoding(20))[0].text


def test_reset_quit_and_unknown_commands(model: Llava) -> None:
    chat = _talk(model, ["Hello?", "/reset", "/imagine", "/image", "/help", "/quit", "never asked"])
    assert chat.dialogue == Dialogue() and isinstance(chat.out, io.StringIO)
    told = chat.out.getvalue()
    assert "/imagine: unknown command" in told and "expected a file after it" in told and told.count(SHOWN) == 1


class Interrupting(io.StringIO):
    """Presses Ctrl-C when the first piece of the answer appears."""

    pressed = False

    def write(self, text: str) -> int:
        if "It is" in text and not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_interrupt_stops_the_answer_and_the_talk_goes_on(tmp_path: Path) -> None:
    endless = Llava(make_scripted_llava(tmp_path / "endless", ["It is ", "so, "], ends=False), device="cpu")
    chat = _talk(endless, ["Well?", "/image no.png"], out=Interrupting(), longest=480)
    stopped = chat.dialogue.messages[-1]
    assert stopped["role"] == "assistant" and stopped["content"].startswith("It is") and len(stopped["content"]) < 480
    assert isinstance(chat.out, io.StringIO) and "[stopped]" in chat.out.getvalue() and "no such file" in chat.out.getvalue()


def test_closing_a_stream_ends_the_model_and_its_errors_reach_the_reader(model: Llava, tmp_path: Path) -> None:
    endless = Llava(make_scripted_llava(tmp_path / "endless", ["on, "], ends=False), device="cpu")
    pieces = endless.stream(Dialogue().with_question("Well?", []).prompt(endless, 480), Decoding(480))
    assert next(pieces).startswith("on")
    pieces.close()
    question = Dialogue().with_question("Hm?", [Image.new("RGB", (40, 40))] * 2).prompt(model, 20)
    with pytest.raises(ValueError, match=r"(?i)image"):
        list(model.stream(question._replace(images=question.images[:1]), Decoding(20)))


def test_too_long_a_conversation_says_what_to_do_and_keeps_it(model: Llava, red: Path) -> None:
    chat = _talk(model, ["Hello?", f"/image {red}", "word " * 100])
    assert isinstance(chat.out, io.StringIO)
    assert "more than the 512 that the model takes. /reset starts a new one." in chat.out.getvalue()
    assert len(chat.dialogue.messages) == 2 and len(chat.images) == 1  # the image waits for a shorter question
    with pytest.raises(UserError, match="more than the 512"):
        _talk(model, ["word " * 200], interactive=False)


def test_questions_that_are_none() -> None:
    for text, cause in (
        ("  ", "found no text"),
        ("a <image>", "may not hold <image>"),
        ("a" * 20_001, "at most 20000 characters"),
    ):
        with pytest.raises(UserError, match=cause):
            Dialogue().with_question(text, [])


def test_piped_questions_and_a_bad_image(
    folder: Path, red: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"Which colour?\nSure?\n/image {red.parent}/none.png\nNot asked\n"
    arguments = ["lmm", "chat", str(folder), "--image", str(red), "--device", "cpu", "--max_new_tokens", "20"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == f"{SHOWN}\n{SHOWN}\n"
    assert printed.err.strip().endswith("none.png: expected an image, but there is no such file. Check the path.")


def test_small_parts() -> None:
    assert list(read_lines(io.StringIO("a\nb"))) == ["a", "b"]
    assert printable("a\x1b]0;t\x07b\u202ec\n\td") == "a]0;tbc\n\td"
