"""`lmm inspect-mask` and `lmm check-data`, as a user runs them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_lmm import conversation, make_tokenizer
from transformers import AutoProcessor

from lift.common.cli import run_command
from lift.common.ledger import DropLedger
from lmm.__main__ import COMMANDS
from lmm.build import build
from lmm.check_data import histogram
from lmm.conversation import IGNORED_LABEL
from lmm.data import check_samples
from lmm.inspect_mask import visible
from lmm.recipes import open_choice
from lmm.settings import BuildSettings, CheckDataSettings

FIXTURE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "llava_masks"


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("m") / "model"))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = run_command("lmm", COMMANDS, [str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def objects(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, dict[str, Any]]:
    status, out, err = run(capsys, "inspect-mask", *arguments, "--json")
    assert status == 0, err
    return {value["id"]: value for value in map(json.loads, out.splitlines())}


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"reference labels of the original LLaVA are not at {FIXTURE}")
def test_json_of_the_reference_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    file, tokenizer = FIXTURE / "conversations.json", FIXTURE / "tok_slow_legacy_false"
    found = objects(capsys, "--data", file, "--tokenizer", tokenizer, "--template", "vicuna_v1")
    reference = json.loads((FIXTURE / "out_v1_slow_legacy_false.json").read_text())["results"]
    assert list(found) == list(reference)
    for name in ("img_multi", "img_only", "unicode", "whitespace", "long_img_multi"):
        assert found[name]["input_ids"] == reference[name]["input_ids"]
        assert found[name]["labels"] == reference[name]["labels"]
        assert found[name]["input_ids"].count(-200) == 1
    assert found["answer_has_eos"]["supervised"] == [" The token </s> ends it.</s>"]
    assert found["whitespace"]["supervised"] == ["   Leading and trailing spaces.  </s>"]
    assert found["gpt_first"] == {"id": "gpt_first", "dropped": "starts with an answer", "detail": ""}
    assert sum("dropped" in value for value in found.values()) == 10


def test_json_with_a_recipe_has_the_ids_of_training_with_images_collapsed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    source = {"annotations": str(data / "chat.json"), "images": str(data / "images")}
    recipe.write_text(json.dumps({"model": str(model), "data": [source], "template": "chat", "max_length": 400}))
    found = objects(capsys, "--config", recipe, "--n", 3)
    assert list(found) == ["0", "1", "2"]
    image_id = AutoProcessor.from_pretrained(model).tokenizer.convert_tokens_to_ids("<image>")
    assert [value["input_ids"].count(image_id) for value in found.values()] == [0, 1, 1]
    assert found["1"]["supervised"] == [" It is green.<eos>"]
    assert [label for label in found["1"]["labels"] if label != IGNORED_LABEL] == found["1"]["input_ids"][
        -len(" It is green.") - 1 :
    ]
    same = objects(capsys, "--data", data / "chat.json", "--tokenizer", model, "--template", "chat")
    assert {name: same[name] for name in found} == found


def test_recipe_of_finetune_needs_no_model(
    tower: Path, llm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = {
        f"stage{number}": {"data": [{"annotations": str(data / f"{name}.json"), "images": str(data / "images")}]}
        for number, name in ((1, "caption"), (2, "chat"))
    }
    recipe.write_text(json.dumps({"vision_tower": str(tower), "llm": str(llm), **stages}))
    first = objects(capsys, "--config", recipe, "--stage", "stage1", "--n", 1)
    assert first["0"]["supervised"] == ["a red picture\n"]
    last = objects(capsys, "--config", recipe, "--n", 1)
    assert last["0"]["supervised"] == [" It is red<eos>"]


def test_colour_is_for_terminals_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [conversation("a", "Yes.\x1b[2J", "a.png"), conversation("b", "", None)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ("inspect-mask", "--data", tmp_path / "rows.json", "--tokenizer", model, "--template", "chat")
    _, plain, _ = run(capsys, *arguments)
    assert "USER: <image>\nWhich colour? ASSISTANT:[[ Yes.\\x1b[2J<eos>]]" in plain
    assert "\x1b" not in plain and "#1:b: dropped, empty answer" in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, coloured, _ = run(capsys, *arguments)
    assert "ASSISTANT:\x1b[32m Yes.\\x1b[2J<eos>\x1b[0m" in coloured
    assert visible("a\tb\nc\r\u202e") == "a\tb\nc\\x0d\\x202e"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config RECIPE or --data FILE"),
        (["--data", "x.json"], "needs --tokenizer"),
        (["--config", "none.yaml", "--template", "chat"], "--template: has no say beside --config"),
        (["--data", "x.json", "--tokenizer", "none", "--stage", "stage1"], "--stage: has no say beside --data"),
        (["--data", "x.json", "--tokenizer", "none"], "no such file"),
        (["--config", "none.yaml"], "no such file"),
        (["--data", "DATA", "--tokenizer", "none"], "tokenizer's folder"),
        (["--data", "DATA", "--tokenizer", "EMPTY"], "expected a tokenizer"),
        (["--data", "DATA", "--tokenizer", "LLAMA"], "expected a SentencePiece model"),
        (["--data", "DATA", "--tokenizer", "BARE", "--template", "chat"], "chat template"),
    ],
)
def test_unusable_arguments_are_one_message(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "llama"):
        (tmp_path / name).mkdir()
    (tmp_path / "llama" / "tokenizer.model").write_bytes(b"no model")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "bare")
    places = {
        "DATA": data / "chat.json", "EMPTY": tmp_path / "empty", "LLAMA": tmp_path / "llama", "BARE": tmp_path / "bare",
    }  # fmt: skip
    status, out, err = run(capsys, "inspect-mask", *(places.get(word, word) for word in arguments))
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


@pytest.fixture
def faulty(data: Path, tmp_path: Path) -> Path:
    """A folder with `rows.json`, 40 good samples and one of each fault, and its `images`."""
    shutil.copytree(data / "images", tmp_path / "faulty" / "images")
    folder = tmp_path / "faulty"
    Image.effect_noise((80, 80), 50).save(folder / "images" / "cut.jpg")
    whole = (folder / "images" / "cut.jpg").read_bytes()
    (folder / "images" / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    good = [conversation(f"good{number}", "Red.", f"{number % 12}.png") for number in range(40)]
    turns = good[0]["conversations"]
    bad = [
        conversation("cut", "Red.", "cut.jpg"),
        conversation("none", "Red.", "none.png"),
        conversation("empty", " ", None),
        conversation("long", "x" * 2500, None),
        {"id": "role", "conversations": [{"from": "bot", "value": "Hi"}, turns[1]]},
        {"id": "gpt first", "conversations": turns[::-1], "image": "1.png"},
        {"id": "no marker", "conversations": [{"from": "human", "value": "Hi"}, turns[1]], "image": "1.png"},
        {"id": "no image", "conversations": turns},
        "text",
        conversation("good0", "Blue.", "1.png"),
        good[1],
    ]
    (folder / "rows.json").write_text(json.dumps(good + bad))
    return folder


FAULTS = {
    "undecodable image": 1, "missing image": 1, "empty answer": 1, "longer than max_length": 1, "unknown role": 1,
    "starts with an answer": 1, "image count": 2, "malformed row": 1,
}  # fmt: skip


def test_check_data_counts_every_fault_and_fails_above_the_limit(
    faulty: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("check-data", "--data", faulty / "rows.json", "--images", faulty / "images", "--tokenizer", model)
    status, out, err = run(capsys, *arguments, "--out", tmp_path / "report")
    assert status == 2 and "9 of 51 samples cannot be used" in err and "dropped.jsonl" in err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["faults"] == FAULTS
    assert (report["samples"], report["usable"]) == (51, 42)
    assert (report["repeated_ids"], report["repeated_samples"]) == (2, 1)
    assert report["max_length"] == 2048 and report["share_over_max_length"] == round(1 / 51, 6)
    supervised = 41 * len(" Red.<eos>".replace("<eos>", "e")) + len(" Blue.e")
    assert report["supervised_tokens"] == supervised
    assert sum(report["length_histogram"]["samples"]) == 45  # those that could be tokenised, also without their image
    dropped = [json.loads(line) for line in (tmp_path / "report" / "dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 9 and {row["cause"] for row in dropped} == FAULTS.keys()
    for words in ("2 image count", "over max_length    1.96% of the samples", "2 ids, 1 samples with the same content"):
        assert words in out, words
    assert run(capsys, *arguments, "--max_drop_fraction", "0.2")[0] == 0


def test_check_data_with_a_recipe_takes_its_limits_and_agrees_with_training(
    faulty: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    source = {"annotations": str(faulty / "rows.json"), "images": str(faulty / "images")}
    values = {"model": str(model), "data": [source], "template": "chat", "max_length": 70, "max_drop_fraction": 0.2}
    recipe.write_text(json.dumps(values))
    status, _, _ = run(capsys, "check-data", "--config", recipe, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert status == 0
    assert run(capsys, "check-data", "--config", recipe, "--max_drop_fraction", "0.1")[0] == 2
    assert report["max_length"] == 70
    assert report["length_percentiles"]["100"] == len("USER: Which colour? ASSISTANT: ") + 2500 + 1
    choice = open_choice(CheckDataSettings(recipe=recipe), None, True)
    assert choice.encoder is not None
    ledger = DropLedger()
    usable, supervised = check_samples(choice.rows, choice.encoder, ledger, 0)
    assert ledger.counts() == report["faults"]
    assert (len(usable), supervised) == (report["usable"], report["supervised_tokens"])


def test_check_data_without_tokenizer_or_images(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("check-data", "--data", faulty / "rows.json", "--max_drop_fraction", 1)
    status, out, _ = run(capsys, *arguments, "--images", faulty / "images")
    assert status == 0 and "1 undecodable image" in out and "tokens" not in out
    status, out, _ = run(capsys, *arguments, "--decode", "false")
    assert status == 0 and "undecodable" not in out and "2 image count" in out


def test_histogram_covers_every_length() -> None:
    counts, edges = histogram(np.array([1, 31, 32, 63, 64, 127, 128]))
    assert edges == [0, 32, 64, 128, 256]
    assert counts == [2, 2, 2, 1]
    assert histogram(np.array([5])) == ([1, 0], [0, 32, 64])
