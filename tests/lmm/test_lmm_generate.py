"""`lmm generate`: batches change nothing, an interrupted run goes on, and what cannot be answered is told before the work."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scripted_llava import make_scripted_llava
from tiny_lmm import COLOURS
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lift.common.files import read_jsonl, write_jsonl
from lmm.__main__ import main
from lmm.build import build
from lmm.conversation import SampleFault
from lmm.generate import generate
from lmm.inference import Llava, longest_first
from lmm.questions import parse_question
from lmm.settings import BuildSettings, GenerateSettings


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a projector strong enough that answers depend on the image."""
    folder = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("generate") / "llava"))
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_2.weight.mul_(30)
    llava.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, (name, colour) in enumerate(COLOURS.items()):
        picture = Image.new("RGB", (40 + 9 * number, 36), colour)
        picture.putpixel((number, 3), (1, 2, 3))
        picture.save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no image")
    return folder


ROWS: list[dict[str, Any]] = [
    {"question_id": 7, "image": "red.png", "text": "Which colour?"},
    {"question_id": 8, "image": "blue.png", "text": "Which colour?"},
    {"question_id": "words", "text": "word " * 9 + "and no image?"},
    {"question_id": 9, "image": "green.png", "text": "A longer question about this image, is it?"},
    {"question_id": 10, "image": ["red.png", "white.png"], "text": "Compare <image> with <image>."},
    {"question_id": 11, "image": ["white.png", "red.png"], "text": "Compare <image> with <image>."},
    {"question_id": 12, "text": "Hm?"},
    {
        "id": "turns",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image", "image": "blue.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "Why?"},
        ],
    },
    {"question_id": 13, "images": ["red.png"], "messages": [{"role": "user", "content": "At the end <image>"}]},
]


def _settings(model: Path, folder: Path, rows: list[Any], images: Path | None, **changes: Any) -> GenerateSettings:
    write_jsonl(folder / "questions.jsonl", rows)
    values: dict[str, Any] = {"out": folder / "answers.jsonl", "max_new_tokens": 10, "batch_size": 4, "device": "cpu"} | changes
    return GenerateSettings(model, questions=folder / "questions.jsonl", images=images, **values)


def test_batches_give_the_answers_of_batch_size_one(model: Path, images: Path, tmp_path: Path) -> None:
    answers = []
    for batch_size in (1, 4, 8):
        out = tmp_path / f"{batch_size}.jsonl"
        generate(_settings(model, tmp_path, ROWS, images, out=out, batch_size=batch_size))
        answers.append(read_jsonl(out))
    assert answers[0] == answers[1] == answers[2]
    assert [row["question_id"] for row in answers[0]] == [row.get("question_id", "turns") for row in ROWS]
    texts = [row["text"] for row in answers[0]]
    assert len(set(texts)) >= 7 and texts[0] != texts[1] and texts[4] != texts[5]  # images count, and their order
    assert answers[0][4]["prompt"] == "Compare  with ." and answers[0][0]["model_id"] == "llava"
    assert len({row["answer_id"] for row in answers[0]}) == len(ROWS)
    assert sorted(path.name for path in tmp_path.glob("4*")) == ["4.jsonl", "4.jsonl.run.json"]


def test_plain_transformers_gives_the_same_answer(model: Path, images: Path, tmp_path: Path) -> None:
    generate(_settings(model, tmp_path, ROWS, images))
    processor, llava = AutoProcessor.from_pretrained(model), LlavaForConditionalGeneration.from_pretrained(model).eval()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(images / "red.png"), return_tensors="pt")
    tokens = llava.generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
    assert read_jsonl(tmp_path / "answers.jsonl")[0]["text"] == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_draws_depend_on_the_question_and_the_seed_alone(model: Path, images: Path, tmp_path: Path) -> None:
    texts = {}
    for seed, batch_size in ((0, 1), (0, 8), (1, 8)):
        out = tmp_path / f"{seed}_{batch_size}.jsonl"
        generate(_settings(model, tmp_path, ROWS, images, out=out, batch_size=batch_size, temperature=0.9, seed=seed))
        texts[seed, batch_size] = [row["text"] for row in read_jsonl(out)]
    assert texts[0, 1] == texts[0, 8] != texts[1, 8]


def test_an_answer_ends_at_the_end_token_or_is_marked_as_cut(tmp_path: Path) -> None:
    model = make_scripted_llava(tmp_path / "scripted", ["It is ", "red", "."])
    rows = [{"question_id": 1, "text": "Which colour?"}, {"question_id": 2, "text": "And a longer one?"}]
    for longest, text, cut in ((4, "It is red.", False), (3, "It is red.", True), (2, "It is red", True)):
        out = tmp_path / f"{longest}.jsonl"
        generate(_settings(model, tmp_path, rows, None, out=out, max_new_tokens=longest))
        assert [(row["text"], row["metadata"]) for row in read_jsonl(out)] == [(text, {"cut": cut})] * 2


def test_an_interrupted_run_goes_on(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.jsonl"
    generate(_settings(model, tmp_path, ROWS, images, out=whole))
    answered: list[int] = []
    answer = Llava.answer

    def counted(self: Llava, questions: Any, *arguments: Any) -> Any:
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(len(questions))
        return answer(self, questions, *arguments)

    monkeypatch.setattr(Llava, "answer", counted)
    settings = _settings(model, tmp_path, ROWS, images, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        generate(settings)
    progress = tmp_path / "answers.jsonl.progress.jsonl"
    assert not settings.out.exists() and len(read_jsonl(progress)) == 6  # type: ignore[union-attr]
    progress.write_text(progress.read_text() + '{"key": "12", "te')  # the kill came in the middle of a line
    answered.clear()
    generate(settings)
    assert answered == [3] and not progress.exists()
    assert (tmp_path / "answers.jsonl").read_text() == whole.read_text()


def test_finished_answers_are_reused_and_others_are_not_overwritten(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(model, tmp_path, ROWS[:3], images)
    generate(settings)
    before = (tmp_path / "answers.jsonl").read_text()

    def fail(*_: Any) -> None:
        raise AssertionError("answered again")

    monkeypatch.setattr(Llava, "answer", fail)
    generate(_settings(model, tmp_path, ROWS[:3], images, batch_size=1))
    assert "reused" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"answers\.jsonl: holds the answers of another run; different are max_new_tokens"):
        generate(_settings(model, tmp_path, ROWS[:3], images, max_new_tokens=11))
    with pytest.raises(UserError, match="different are questions_hash"):
        generate(_settings(model, tmp_path, ROWS[:2], images))
    (tmp_path / "notes.jsonl").write_text("mine")
    with pytest.raises(UserError, match="was not written by `lmm generate`"):
        generate(_settings(model, tmp_path, ROWS[:3], images, out=tmp_path / "notes.jsonl"))
    assert (tmp_path / "answers.jsonl").read_text() == before and (tmp_path / "notes.jsonl").read_text() == "mine"


def test_what_cannot_be_answered_stops_the_run_or_is_left_out(model: Path, images: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:3], *({"question_id": name, "image": f"{name}.png", "text": "?"} for name in ("broken", "none"))]
    rows.append({"question_id": "long", "text": "word " * 200})
    with pytest.raises(UserError, match=r"question broken: undecodable image .*broken\.png: ImageFault.*dropped 2 of 6"):
        generate(_settings(model, tmp_path, rows, images))
    with pytest.raises(UserError, match=r"question broken: .*dropped 3 of 6 samples: .*1 too long"):
        generate(_settings(model, tmp_path, rows, images, max_drop_fraction=0.4))
    dropped = {row["key"]: row["cause"] for row in read_jsonl(tmp_path / "answers.jsonl.dropped.jsonl")}
    assert dropped == {"broken": "undecodable image", "none": "missing image", "long": "too long"}
    assert not (tmp_path / "answers.jsonl").exists()
    generate(_settings(model, tmp_path, rows, images, max_drop_fraction=0.5))
    assert [row["question_id"] for row in read_jsonl(tmp_path / "answers.jsonl")] == [7, 8, "words"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found none"),
        ([["no object"]], r"row 1: expected a JSON object with `question_id`"),
        ([{"text": "?"}], r"row 1: expected a `question_id`"),
        ([ROWS[0], ROWS[0]], r"row 2: question_id 7 is that of row 1 too"),
        ([{"question_id": 1}], r"question 1: no text"),
        ([{"question_id": 1, "text": " <image> ", "image": "red.png"}], "no text"),
        (
            [{"question_id": 1, "text": "<image> a <image>", "image": "red.png"}],
            r"image count \(2 <image> .* 1 images",
        ),
        ([{"question_id": 1, "text": "<image> a"}], r"1 <image> in the text, 0 images"),
        ([{"question_id": 1, "text": "a", "image": "../red.png"}], "image outside its folder"),
        ([{"question_id": 1, "messages": [{"role": "assistant", "content": "a"}]}], "roles do not alternate"),
        ([{"question_id": 1, "messages": [{"role": "user", "content": "a"}] * 2}], "roles do not alternate"),
        ([{"question_id": 1, "messages": [{"role": "tool", "content": "a"}]}], "unknown role"),
        ([{"question_id": 1, "messages": [{"role": "user", "content": [{"type": "video"}]}]}], "unknown content part"),
    ],
)
def test_bad_questions(rows: list[Any], message: str, model: Path, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lmm.generate.Llava", None)  # told before a model is loaded
    with pytest.raises(UserError, match=message):
        generate(_settings(model, tmp_path, rows, images))
    assert not (tmp_path / "answers.jsonl").exists() and not (tmp_path / "answers.jsonl.lock").exists()


def test_bad_folders(
    model: Path, llm: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    with pytest.raises(UserError, match="expected model_type 'llava', found 'llama'"):
        generate(_settings(llm, tmp_path, ROWS, images))
    with pytest.raises(UserError, match="no such folder"):
        generate(_settings(tmp_path / "none", tmp_path, ROWS, images))
    with pytest.raises(UserError, match=r"no image folder \(the row names red.png; give --images FOLDER"):
        generate(_settings(model, tmp_path, ROWS, None))
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in model.iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[:3000] if file.suffix == ".safetensors" else file.read_bytes())
    with pytest.raises(UserError, match="cut: the model cannot be loaded"):
        generate(_settings(cut, tmp_path, ROWS, images))
    weights = load_file(model / "model.safetensors")
    key = next(key for key in weights if "q_proj" in key)
    weights["unknown"] = weights.pop(key)
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cut: expected the weights .* misshapen are [^,]*q_proj[^,]*$"):
        generate(_settings(cut, tmp_path, ROWS, images))
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 24
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"other: expected .* misshapen are [^,]*multi_modal_projector.linear_1",
    ):
        generate(_settings(other, tmp_path, ROWS, images))
    monkeypatch.setattr(sys, "argv", ["lmm", "generate", str(model)])
    assert main() == 2
    assert "--questions FILE.jsonl is required" in capsys.readouterr().err


def test_texts_without_a_marker_get_their_images_first() -> None:
    row = parse_question({"text": "Both?", "image": ["a", "b"]}, 1, Path("f"))
    assert row.messages == [{"role": "user", "content": "<image>\n<image>\nBoth?"}] and row.images == [Path("f/a"), Path("f/b")]
    assert (
        parse_question({"text": "See <image> here", "image": "a"}, 1, Path("f")).messages[0]["content"] == "<image>\nSee  here"
    )
    with pytest.raises(SampleFault, match="no image folder"):
        parse_question({"text": "a", "image": "a"}, 1, None)


def test_batches_of_like_length() -> None:
    assert longest_first([3, 9, 3, 7, 1], 2) == [[1, 3], [0, 2], [4]]
