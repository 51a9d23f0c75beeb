"""lmms-eval on a tiny LLaVA: our adapter, batched, gives stock `llava_hf`'s answers; failures leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.__main__ import main
from eval.lmm.plugin import clean_answer
from eval.mmbench_data import TASK, read_questions
from lift.common.files import read_json, read_jsonl, write_json, write_jsonl

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def run_folder(tiny_llava: Path, questions_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["lmm", str(tiny_llava), "--data", str(questions_tsv), "--out", str(out), "--batch_size", "5"]) == 0
    return out


def test_run_folder_is_complete(mmbench: SimpleNamespace, run_folder: Path, questions_tsv: Path) -> None:
    records, run = read_jsonl(run_folder / "records.jsonl"), read_json(run_folder / "run.json")
    assert [row["index"] for row in records] == [row["index"] for row in mmbench.rows()]
    assert all(isinstance(row["response"], str) for row in records) and len({row["response"] for row in records}) > 6
    assert records[-1]["image_sha256"] == read_questions(questions_tsv)[-1]["image_sha256"]
    assert run["task"] == TASK and run["gen"]["dtype"] == "float32" and run["scores"]["overall"]["rows"] == 12
    assert 0 <= run["lmms_eval_static"]["overall_acc"] <= 1
    assert (run_folder / "lmms_eval" / "log.txt").is_file() and not (run_folder / "scratch").exists()
    assert sorted(path.name for path in run_folder.parent.iterdir()) == ["run"]


def test_stock_llava_hf_gives_the_same_answers(
    run_folder: Path, tiny_llava: Path, questions_tsv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stock", str(tiny_llava), "--data", str(questions_tsv), "--against", str(run_folder)]) == 0
    assert "12 rows equal, 0 different" in capsys.readouterr().out


def test_a_difference_from_stock_is_an_error(
    run_folder: Path, tiny_llava: Path, questions_tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    records = read_jsonl(run_folder / "records.jsonl")
    answers = [row["response"] for row in records]
    monkeypatch.setattr("eval.lmm.command.run_lmms_eval", _fake_run(answers))
    records[3]["response"] = "changed"
    (tmp_path / "run").mkdir()
    write_jsonl(tmp_path / "run" / "records.jsonl", records)
    write_json(tmp_path / "run" / "run.json", read_json(run_folder / "run.json"))
    assert main(["stock", str(tiny_llava), "--data", str(questions_tsv), "--against", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert "11 rows equal, 1 different" in printed.out and "3000001" in printed.err


def _fake_run(answers: list[str]) -> Callable[..., Any]:
    def run(rows: list[dict], model: Path, work: Path, log: Path, **settings: object) -> SimpleNamespace:
        log.write_text("")
        return SimpleNamespace(responses=answers, static_score=None, command="")

    return run


def test_a_finished_run_is_reused_and_another_model_is_not(
    run_folder: Path, tiny_llava: Path, questions_tsv: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("the model was run again")

    monkeypatch.setattr("eval.lmm.command.run_lmms_eval", fail)
    arguments = ["lmm", str(tiny_llava), "--data", str(questions_tsv), "--out", str(run_folder)]
    assert main([*arguments, "--batch_size", "5"]) == 0
    assert "reused" in capsys.readouterr().out
    assert main([*arguments, "--batch_size", "4"]) == 1  # other settings: it runs, and meets `fail`


def test_a_failed_run_leaves_no_folder_and_names_the_cause(
    tiny_llava: Path, questions_tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llava.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((tiny_llava / "model.safetensors").read_bytes()[:1000])
    out = tmp_path / "runs" / "run"
    assert main(["lmm", str(broken), "--data", str(questions_tsv), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "lmms-eval failed (status 1)" in message and "run.log" in message and "Traceback" not in message
    assert [path.name for path in out.parent.iterdir()] == ["run.log"]


def test_refused_before_anything_runs(
    mmbench: SimpleNamespace, tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = mmbench.rows()
    rows[0]["answer"] = "E"
    bad_data = mmbench.write(rows, tmp_path / "bad.tsv")
    assert main(["lmm", str(tiny_llava), "--data", str(bad_data), "--out", str(tmp_path / "run")]) == 2
    assert "bad.tsv: row 2" in capsys.readouterr().err and not (tmp_path / "run").exists()
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    assert main(["lmm", str(tmp_path), "--data", str(bad_data), "--out", str(tmp_path / "run")]) == 2
    assert "model_type 'llava'" in capsys.readouterr().err


def _request(text: str, image: Any, until: list[str]) -> SimpleNamespace:
    content = [{"type": "image", "url": image}] if image is not None else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    settings = {"until": until, "max_new_tokens": 12, "temperature": 0, "do_sample": False, "num_beams": 1}
    return SimpleNamespace(args=(text, lambda doc: messages, settings, 0, "task", "split"))


def test_adapter_batches_text_only_rows_and_stops(tiny_llava: Path) -> None:
    from PIL import Image

    from eval.lmm.adapter import LiftLlava

    model = LiftLlava(str(tiny_llava), dtype="float32", device="cpu", batch_size=4)
    model.task_dict = {"task": {"split": [None]}}
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "green", "blue")]
    requests: list[Any] = [
        _request("word " * n, image, []) for n, image in enumerate([images[0], None, images[1], None, images[2], None])
    ]
    batched = model.generate_until(requests)
    model.batch_size = 1
    assert batched == model.generate_until(requests) and len(set(batched)) > 3
    stop = batched[0][3:5]
    assert model.generate_until([_request("word " * 0, images[0], [stop])])[0] == batched[0].split(stop)[0]  # type: ignore[list-item]
    with pytest.raises(ValueError, match="image tokens"):
        model.generate_until([_request("what is <image> here", images[0], [])])  # type: ignore[list-item]


def test_clean_answer() -> None:
    assert clean_answer("B\x07\x1f ASSISTANT: more", ["ASSISTANT:"]) == "B "
