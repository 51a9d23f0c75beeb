"""`lmm serve` in a headless Chromium: upload, question, answers side by side; hostile answers, names and files do nothing."""

from __future__ import annotations

import json
import os
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from scripted_llava import make_scripted_llava

pytest.importorskip("gradio", reason='lmm serve needs gradio: pip install "lift-toolkit[serve]"')

from lift.common.errors import UserError
from lift.common.settings import parse_settings
from lmm.__main__ import COMMANDS
from lmm.dialogue import Dialogue
from lmm.inference import Decoding, Llava
from lmm.serve import Page, launch
from lmm.settings import ServeSettings

ATTACK = "<script>window.owned=1</script><img src=x onerror=window.owned=1>**bold** [a](javascript:window.owned=1)"
LIFT_SAYS, CLIP_SAYS = "The picture is red.", ATTACK
FILE_NAME = "<img src=x onerror=window.owned=1>.png"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A running page with two models, and a folder of files to upload."""
    folder = tmp_path_factory.mktemp("serve")
    models = [
        Llava(make_scripted_llava(folder / "lift", ["The picture ", "is red."]), device="cpu"),
        Llava(make_scripted_llava(folder / "clip", [ATTACK]), device="cpu"),
    ]
    files = folder / "files"
    files.mkdir()
    Image.new("RGB", (60, 40), "red").save(files / "red.png")
    (files / FILE_NAME).write_bytes(b"no image")
    (files / "bomb.png").write_bytes(_png_header(60_000, 60_000))
    (files / "large.png").write_bytes(os.urandom(1_500_000))
    shown = Page(models, Decoding(16))
    url = launch(shown, port=0, max_upload_mb=1)
    yield SimpleNamespace(url=url, files=files, page=shown, models=models)
    shown.blocks.close()


@pytest.fixture
def tab(browser: Any, page: SimpleNamespace) -> Iterator[Any]:
    """A fresh page; afterwards no script of an answer has run and nothing was asked of another host."""
    tab = browser.new_page(viewport={"width": 1200, "height": 800})
    tab.set_default_timeout(20_000)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.url)
    tab.wait_for_selector("#ask textarea")
    yield tab
    assert tab.evaluate("window.owned") is None
    assert asked and [url for url in asked if not url.startswith((page.url, "data:", "blob:"))] == []
    tab.close()


def _ask(tab: Any, text: str, file: Path | None = None) -> None:
    if file is not None:
        tab.set_input_files("#ask input[type=file]", str(file))
        tab.wait_for_selector("#ask .thumbnail-item")
    tab.fill("#ask textarea", text)
    tab.press("#ask textarea", "Enter")


def test_upload_question_and_answers_side_by_side(tab: Any, page: SimpleNamespace) -> None:
    _ask(tab, "Which colour?", page.files / "red.png")
    left = tab.locator("#answers0").get_by_text(LIFT_SAYS, exact=True)
    right = tab.locator("#answers1").get_by_text(ATTACK, exact=True)  # as text: neither markup nor markdown
    left.wait_for()
    right.wait_for()
    assert tab.locator("#answers0 .user img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [60, 40]
    assert tab.locator("#answers1 .bot img, #answers1 .bot script, #answers1 .bot a, #answers1 .bot strong").count() == 0
    one, two = tab.locator("#answers0").bounding_box(), tab.locator("#answers1").bounding_box()
    assert one["y"] == two["y"] and one["x"] + one["width"] <= two["x"]

    _ask(tab, "<b>And</b> now?")  # a second turn; what a person types is text as well
    tab.locator("#answers0").get_by_text(LIFT_SAYS, exact=True).nth(1).wait_for()
    assert tab.locator("#answers0").get_by_text("<b>And</b> now?", exact=True).count() == 1

    tab.set_viewport_size({"width": 400, "height": 800})
    tab.wait_for_function("document.querySelector('#answers1').getBoundingClientRect().x < 100")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.click("#again")
    left.first.wait_for(state="detached")
    _ask(tab, "Alone?")
    left.wait_for()
    assert tab.locator("#answers0 .user").filter(has_text="Which colour?").count() == 0


def test_refused_uploads_are_told_and_change_nothing(tab: Any, page: SimpleNamespace) -> None:
    _ask(tab, "What is this?", page.files / "bomb.png")
    tab.get_by_text("3600000000 pixels").or_(tab.get_by_text("60000 x 60000")).first.wait_for()
    assert tab.locator("#answers0 .user").count() == 0


def test_markup_in_a_file_name_is_text(tab: Any, page: SimpleNamespace) -> None:
    _ask(tab, "What is this?", page.files / FILE_NAME)
    tab.get_by_text("not an image that can be decoded").first.wait_for()
    assert tab.locator("#answers0 .user").count() == 0 and tab.locator(".toast-wrap img").count() == 0
    tab.click("#again")
    tab.locator("#ask .thumbnail-item").wait_for(state="detached")  # the box is emptied before the next question is typed
    _ask(tab, "And without?")
    tab.locator("#answers0").get_by_text(LIFT_SAYS, exact=True).wait_for()


def test_upload_above_the_limit_is_refused(page: SimpleNamespace) -> None:
    status, _ = _upload(page, "large.png")
    assert status == 413
    status, answer = _upload(page, "red.png")
    assert status == 200 and Path(json.loads(answer)[0]).read_bytes() == (page.files / "red.png").read_bytes()


def test_headers_keep_the_browser_on_this_machine(page: SimpleNamespace) -> None:
    with urllib.request.urlopen(page.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
        text = answer.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    assert "fonts.googleapis.com" not in text and '"analytics_enabled":false' in text.replace(" ", "")
    assert page.url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="400"):  # as a foreign name that points to this machine would ask
        urllib.request.urlopen(urllib.request.Request(page.url, headers={"Host": "evil.example"}))


def test_a_question_waits_for_the_last_answer_and_faults_change_nothing(page: SimpleNamespace) -> None:
    waiting = Dialogue().with_question("first", [])
    with pytest.warns(UserWarning, match="still being answered"):
        unchanged = page.page.ask({"text": "second", "files": []}, waiting, waiting, [], [])
    assert len(unchanged) == 5 and all(value == {"__type__": "update"} for value in unchanged)
    assert len(list(page.page.answer(0, Dialogue(), []))) == 1
    for text, cause in (("", "found no text"), ("<image>", "may not hold"), ("long " * 200, "more than the 512")):
        with pytest.warns(UserWarning, match=cause):
            page.page.ask({"text": text, "files": []}, Dialogue(), Dialogue(), [], [])


@pytest.mark.parametrize(
    "words",
    [
        "a b --port 1",
        "a --port 1 b",
        "--port 1 a b",
        "--port=1 a --device cpu b",
        "a --against b --port 1",
        "--against=b --port 1 a",
    ],
)
def test_the_second_folder_by_position_wherever_options_stand(words: str) -> None:
    settings = _serve_settings(words)
    assert (settings.model, settings.against, settings.port) == (Path("a"), Path("b"), 1)


def test_one_folder_and_too_many() -> None:
    assert _serve_settings("--port 1 a").against is None
    with pytest.raises(UserError, match="--against: given also by position, as 'b'"):
        _serve_settings("a b --against c")
    with pytest.raises(UserError, match="c"):
        _serve_settings("a b c")


def _serve_settings(words: str) -> ServeSettings:
    return parse_settings(ServeSettings, words.split(), "lmm serve", "", COMMANDS["serve"].positional)


def test_port_that_is_taken(page: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="Choose another"):
        launch(Page(page.models, Decoding(4)), int(page.url.rstrip("/").rpartition(":")[2]), 1)


def _upload(page: SimpleNamespace, name: str) -> tuple[int, bytes]:
    """Status and body of gradio's upload route, called as the page does."""
    body = (
        f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'.encode()
        + (page.files / name).read_bytes()
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{page.url}gradio_api/upload", body, headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be enormous."""
    chunks = b""
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunks
