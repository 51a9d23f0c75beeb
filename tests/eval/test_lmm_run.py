"""lmms-eval on a tiny LLaVA: whole and interrupted runs; answers in batches, of stock `llava_hf`, of plain transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from eval.__main__ import main
from eval.answers.score import scores_of
from eval.lmm import stock
from eval.lmm.answers import ANSWERS_FILE, Answer, open_answers, read_answers, without_images
from eval.lmm.data import data_hash
from eval.lmm.plugin import clean_answer
from eval.lmm.run_folder import check_run_folder, told_apart
from eval.lmm.tasks import LMM_TASKS, image_hash
from eval.records import Record, read_records, write_records
from lift.common.errors import UserError
from lift.common.files import read_json, write_json

os.environ["HF_HUB_OFFLINE"] = "1"

TASK = LMM_TASKS["mmbench"].lmms_task
SECRET = "hf_tokenOfNobody"


@pytest.fixture(scope="module")
def data_folder(questions_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve questions as MMBench's English and Chinese data."""
    out = tmp_path_factory.mktemp("data") / "lmms, data"
    for name in ("mmbench", "mmbench_cn"):
        LMM_TASKS[name].convert(questions_tsv, out)
    return out


@pytest.fixture(scope="module")
def run_folder(tiny_llava: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs, all") / "run"  # lmms-eval splits its arguments at commas
    arguments = ["lmm", str(tiny_llava), "--tasks", "mmbench,mmbench_cn", "--data", str(data_folder), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        assert main([*arguments, "--batch_size", "5"]) == 0
    return out


def test_a_token_of_the_hub_is_in_no_kept_file(run_folder: Path) -> None:
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert len(files) > 6 and not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_run_folder_is_complete(mmbench: SimpleNamespace, run_folder: Path) -> None:
    run = read_json(run_folder / "run.json")
    assert sorted(path.name for path in run_folder.iterdir()) == [".lock", "mmbench", "mmbench_cn", "run.json"]
    assert run["gen"] == {"greedy": True, "dtype": "float32", "device": "cpu"} and len(run["tasks"]) == 2
    for name in ("mmbench", "mmbench_cn"):
        records = read_records(run_folder / name / "records.jsonl")
        assert [int(record.key) for record in records] == [row["index"] for row in mmbench.rows()]
        assert len({record.response for record in records}) > 6 and all(record.images for record in records)
        assert run["tasks"][name]["rows"] == 12 and run["tasks"][name]["seconds"] > 0
        with zipfile.ZipFile(run_folder / name / "thumbnails.zip") as archive:
            assert set(archive.namelist()) == {f"{record.images[0]}.jpg" for record in records}
            assert archive.read(archive.namelist()[0])[:2] == b"\xff\xd8"
        assert (run_folder / name / "lmms_eval" / "log.txt").is_file()
    scores = run["tasks"]["mmbench"]["lmms_eval"]
    ours = scores_of("mmbench", read_records(run_folder / "mmbench" / "records.jsonl"))
    static = {"overall": ours["overall"]["lmms_eval_static"]}
    for level in ("l2", "l3"):
        static |= {f"{level}/{name}": values["lmms_eval_static"] for name, values in ours[level].items()}
    assert scores == pytest.approx(static)
    assert run["tasks"]["mmbench_cn"]["lmms_eval"] is None  # its scoring would ask a judge
    questions = {json.dumps(record.likelihood.log_probabilities) for record in records if record.likelihood}
    assert len(questions) == 12


def test_stock_llava_hf_gives_the_same_answers(
    run_folder: Path, tiny_llava: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    arguments = ["stock", str(tiny_llava), "--data", str(data_folder), "--against"]
    kept = tmp_path / "outputs"
    run = stock.run_lmms_eval

    def run_and_keep(lmms_tasks: Any, model: Path, work: Path, outputs: Path, log: Path, **settings: Any) -> str:
        command = run(lmms_tasks, model, work, outputs, log, **settings)
        shutil.copytree(outputs, kept)
        return command

    monkeypatch.setattr(stock, "run_lmms_eval", run_and_keep)
    assert main([*arguments, str(run_folder)]) == 0
    assert "24 rows equal, 0 different" in capsys.readouterr().out

    def kept_answers(lmms_tasks: Any, model: Path, work: Path, outputs: Path, log: Path, **settings: Any) -> str:
        shutil.copytree(kept, outputs)
        log.touch()
        return ""

    # the same comparison, with one answer of this run changed
    monkeypatch.setattr(stock, "run_lmms_eval", kept_answers)
    changed = tmp_path / "run"
    shutil.copytree(run_folder, changed)
    (samples,) = changed.rglob(f"*_samples_{TASK}.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    lines[3]["filtered_resps"] = "changed"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([*arguments, str(changed)]) == 2
    printed = capsys.readouterr()
    assert "23 rows equal, 1 different" in printed.out and "3000001" in printed.err and "'changed'" in printed.err


def test_a_killed_run_goes_on_where_it_stopped(
    run_folder: Path, tiny_llava: Path, questions_tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    unfinished = out / "mmbench.unfinished"
    arguments = ["lmm", str(tiny_llava), "--data", str(questions_tsv), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "eval", *arguments, "--batch_size", "1"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(read_answers(unfinished)) < 3:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(read_answers(unfinished))
    assert 3 <= done < 12 and not (out / "mmbench").exists() and not (out / "run.json").exists()

    # marks each kept answer, and leaves a line and a folder as a kill in the middle of writing does
    lines = [json.loads(line) | {"seconds": 1000.0} for line in (unfinished / ANSWERS_FILE).read_bytes().split(b"\n")[:done]]
    torn = json.dumps(lines[0])[:-20]
    (unfinished / ANSWERS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    (out / "mmbench.elsewhere-1-00.partial").mkdir()
    assert main([*arguments, "--batch_size", "5"]) == 0
    assert f"{done} answers taken over" in capsys.readouterr().out
    seconds = read_json(out / "run.json")["tasks"]["mmbench"]["seconds"]
    assert 1000 * done < seconds < 1000 * (done + 1)  # the others were answered now
    pairs = zip(*(read_records(folder / "mmbench" / "records.jsonl") for folder in (out, run_folder)), strict=True)
    for record, expected in pairs:
        assert record.likelihood is not None and expected.likelihood is not None
        # in another batch, float32 rounds otherwise
        probabilities = expected.likelihood.log_probabilities
        assert record.likelihood.log_probabilities == pytest.approx(probabilities, abs=1e-5)
        same = replace(expected.likelihood, log_probabilities=record.likelihood.log_probabilities)
        assert record == replace(expected, likelihood=same)
    assert not unfinished.exists()


def test_a_finished_run_is_reused_and_another_is_not(
    run_folder: Path, tiny_llava: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("the model was run again")

    monkeypatch.setattr("eval.lmm.command.run_lmms_eval", fail)
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    arguments = ["lmm", str(tiny_llava), "--data", str(data_folder), "--out", str(out), "--tasks"]
    assert main([*arguments, "mmbench_cn,mmbench", "--batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": reused,") == 2 and "likelihood %" in printed and "lmms-eval static %" in printed
    # other settings: only that task runs, and meets `fail`
    assert main([*arguments, "mmbench", "--max_new_tokens", "3"]) == 1
    assert "max_new_tokens is another" in capsys.readouterr().out and (out / "mmbench_cn").is_dir()
    # another checkpoint: the finished task that was not asked for is not thrown away
    write_json(out / "run.json", read_json(out / "run.json") | {"model_hash": "another"})
    assert main([*arguments, "mmbench"]) == 2
    assert "holds mmbench_cn of a run with another checkpoint" in capsys.readouterr().err


def test_a_failed_run_names_the_cause_and_does_not_count(
    tiny_llava: Path, questions_tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "broken", tmp_path / "runs" / "run"
    shutil.copytree(tiny_llava, broken)
    (broken / "model.safetensors").write_bytes((tiny_llava / "model.safetensors").read_bytes()[:1000])
    assert main(["lmm", str(broken), "--data", str(questions_tsv), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "lmms-eval failed (status 1)" in message and "lmms_eval.log" in message and "Traceback" not in message
    assert sorted(path.name for path in out.iterdir()) == [".lock", "lmms_eval.log", "mmbench.unfinished"]


def test_refused_before_anything_runs(
    mmbench: SimpleNamespace,
    tiny_llava: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
) -> None:
    rows = mmbench.rows()
    rows[0]["answer"] = "E"
    bad = mmbench.write(rows, tmp_path / "bad.tsv")
    out = tmp_path / "run"
    model = [str(tiny_llava), "--out", str(out)]
    (tmp_path / "text").mkdir()
    write_json(tmp_path / "text" / "config.json", {"model_type": "llama"})
    for arguments, message in (
        ([*model, "--data", str(bad)], "bad.tsv: row 2"),
        ([str(tmp_path / "text"), "--out", str(out), "--data", str(bad)], "model_type 'llava'"),
        ([*model, "--data", str(data_folder)], "--tasks is required"),
        ([*model, "--data", str(data_folder), "--tasks", "mmbnch"], "Did you mean 'mmbench'?"),
        (
            [*model, "--data", str(data_folder), "--tasks", "mmbench,pope"],
            f"lift-eval data FILES --task pope --out {data_folder}",
        ),
        ([*model, "--data", str(bad), "--tasks", "mmbench,gqa"], "is one file of MMBench"),
        ([*model, "--tasks", "mmbench"], "HF_HUB_OFFLINE is set"),
    ):
        assert main(["lmm", *arguments]) == 2
        assert message in capsys.readouterr().err and not out.exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lmm", *model, "--data", str(bad)]) == 2
    assert "lmms-eval is not installed" in capsys.readouterr().err and not out.exists()


def test_adding_a_language_changes_no_data_hash(questions_tsv: Path, tmp_path: Path) -> None:
    english, chinese = LMM_TASKS["mmbench"], LMM_TASKS["mmbench_cn"]
    english.convert(questions_tsv, tmp_path)
    before = data_hash(tmp_path, english)
    chinese.convert(questions_tsv, tmp_path)
    assert before == data_hash(tmp_path, english) and data_hash(tmp_path, chinese) != before


def test_a_run_killed_before_its_first_answer_may_begin_again(tmp_path: Path) -> None:
    (tmp_path / "scratch.partial").mkdir()
    (tmp_path / ".lock").touch()
    check_run_folder(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="found other files"):
        check_run_folder(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_lmms_eval_too(number: int, tmp_path: Path) -> None:
    script = "from eval.lmm.run import _run; from pathlib import Path; import sys; "
    script += '_run([sys.executable, \'-c\', \'import time, os; open("pid", "w").write(str(os.getpid())); '
    script += "os.rename(\"pid\", \"started\"); time.sleep(1000)'], Path('.'), Path('log'), False)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    while process.poll() is None and not (tmp_path / "started").is_file():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == -number
    state = Path("/proc") / (tmp_path / "started").read_text() / "stat"
    while state.is_file() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(0.01)  # for ever, were it to go on


def test_answers_survive_a_kill_and_have_one_writer(tmp_path: Path) -> None:
    answers = [Answer(n, {"question": "é\u2028"}, ["a"], "p", f"answer {n}\n", {"A": -1.5}, 0.5) for n in range(3)]
    with open_answers(tmp_path) as file:
        file.add(answers[:2])
        with pytest.raises(UserError, match="another evaluation"), open_answers(tmp_path):
            pass
    path = tmp_path / ANSWERS_FILE
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:-20], whole + b'{"doc_id": 2', whole + b"\0\0\0\n", whole + b"[1]\n"):
        path.write_bytes(torn)
        kept = read_answers(tmp_path)
        assert list(kept) in ([0], [0, 1]) and kept[0] == answers[0]
        with open_answers(tmp_path) as file:
            file.add(answers[2:])
        assert read_answers(tmp_path) == kept | {2: answers[2]}


def test_docs_are_kept_without_images() -> None:
    image = Image.new("RGB", (2, 2))
    doc = {"id": 1, "choices": ("a", "b"), "image": image, "images": [image], "nested": {"bytes": b"x"}, "none": None}
    assert without_images(doc) == {"id": 1, "choices": ["a", "b"], "none": None}


def _requests(rows: list[tuple[str, list[Image.Image]]], until: list[str] | None = None) -> list[Any]:
    """Requests as lmms-eval makes them, for texts with any number of images."""
    requests = []
    for doc_id, (text, images) in enumerate(rows):
        content = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        settings = {"until": until or [], "max_new_tokens": 12, "temperature": 0, "do_sample": False, "num_beams": 1}
        args = (text, lambda doc, messages=messages: messages, settings, doc_id, TASK, "dev")
        requests.append(SimpleNamespace(args=args))
    return requests


COLOURS = [Image.new("RGB", (50, 40), colour) for colour in ("red", "green", "blue")]


@pytest.fixture
def adapter(tiny_llava: Path) -> Any:
    from eval.lmm.adapter import LiftLlava

    model = LiftLlava(str(tiny_llava), dtype="float32", device="cpu", batch_size=4)
    model.task_dict = {TASK: {"dev": [{}] * 6}}
    return model


def test_adapter_batches_text_only_rows_several_images_and_stops(adapter: Any) -> None:
    images: list[list[Image.Image]] = [[COLOURS[0]], [], COLOURS[:2], [], [COLOURS[2]], []]
    requests = _requests([("word " * number, its) for number, its in enumerate(images)])
    batched = adapter.generate_until(requests)
    adapter.batch_size = 1
    assert batched == adapter.generate_until(requests) and len(set(batched)) > 3
    stop = batched[0][3:5]
    assert adapter.generate_until(_requests([("", images[0])], [stop]))[0] == batched[0].split(stop)[0]
    with pytest.raises(ValueError, match="image tokens"):
        adapter.generate_until(_requests([("what is <image> here", images[0])]))


def test_a_prompt_beyond_the_models_positions_is_named(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _requests([("short", []), ("word " * 40, [])])
    adapter.generate_until(requests)
    monkeypatch.setattr(adapter.model.config.text_config, "max_position_embeddings", 60)
    with pytest.raises(UserError, match=r"task .*, document 1: the prompt has \d+ tokens, .* 60 positions"):
        adapter.generate_until(requests)


def test_equal_rows_under_one_key_are_told_apart_and_others_are_not(tmp_path: Path) -> None:
    row = Record("ai2d", "k", "g", 0, {}, "Which?", {"A": "x", "B": "y"}, ["A"], "A", "A", 1.0, ["image"])
    other = replace(row, question="Another?")
    assert [each.key for each in told_apart([row, replace(row, response="B"), other, row])] == ["k", "k (2)", "k", "k (3)"]
    write_records(tmp_path / "records.jsonl", told_apart([row, other]))
    with pytest.raises(UserError, match="k stands in line 1 already"):
        read_records(tmp_path / "records.jsonl")


def _mmbench_job(adapter: Any, mmbench: SimpleNamespace, folder: Path) -> list[Any]:
    """Gives `adapter` the twelve questions as task `mmbench`, to be answered into `folder`; an image a circular group."""
    from eval.lmm.adapter import TaskJob

    folder.mkdir(exist_ok=True)
    docs = [{**row, "image": COLOURS[int(row["index"]) % 3]} for row in mmbench.rows()]
    adapter.task_dict = {TASK: {"dev": docs}}
    adapter.jobs = {TASK: TaskJob(LMM_TASKS["mmbench"], folder, 6, True)}
    texts = [" ".join(str(doc[name]) for name in ("question", "A", "B", "C", "D")) for doc in docs]
    return _requests([(text, [doc["image"]]) for text, doc in zip(texts, docs, strict=True)])  # type: ignore[list-item]


def test_likelihood_is_that_of_a_plain_forward_whatever_the_batch(
    adapter: Any, mmbench: SimpleNamespace, tmp_path: Path
) -> None:
    import torch

    requests = _mmbench_job(adapter, mmbench, tmp_path / "batched")
    adapter.generate_until(requests)
    adapter.batch_size = 1
    adapter.generate_until(_mmbench_job(adapter, mmbench, tmp_path / "single"))
    batched, single = read_answers(tmp_path / "batched"), read_answers(tmp_path / "single")
    tokenizer = adapter.processor.tokenizer
    for doc_id, request in enumerate(requests):
        letters = LMM_TASKS["mmbench"].letters(batched[doc_id].doc)
        prompt = f"USER: <image>\n{request.args[0]} ASSISTANT:"
        inputs = adapter.processor(text=prompt, images=COLOURS[int(batched[doc_id].doc["index"]) % 3], return_tensors="pt")
        with torch.inference_mode():
            probabilities = adapter.model(**inputs).logits[0, -1].softmax(-1)
        expected = {
            letter: float(probabilities[tokenizer.convert_tokens_to_ids([letter, f"Ġ{letter}"])].sum().log())
            for letter in letters
        }
        assert batched[doc_id].log_probabilities == pytest.approx(expected, abs=1e-5)
        assert single[doc_id].log_probabilities == pytest.approx(expected, abs=1e-5)
        assert batched[doc_id].response == single[doc_id].response


def test_an_image_goes_through_the_tower_once(adapter: Any, mmbench: SimpleNamespace, tmp_path: Path) -> None:
    seen: list[int] = []
    handle = adapter.model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    answers = adapter.generate_until(_mmbench_job(adapter, mmbench, tmp_path / "kept"))
    assert sum(seen) == len({image_hash(image) for image in COLOURS})
    seen.clear()
    adapter.image_features.max_bytes, adapter.batch_size = 0, 1
    assert answers == adapter.generate_until(_mmbench_job(adapter, mmbench, tmp_path / "not kept"))
    handle.remove()
    assert len(seen) > 3  # nothing is kept beyond the bound
    assert adapter.image_features._bytes == 0


def test_rows_answered_before_are_not_answered_again(adapter: Any, mmbench: SimpleNamespace, tmp_path: Path) -> None:
    requests = _mmbench_job(adapter, mmbench, tmp_path / "job")
    answers = adapter.generate_until(requests)
    path = tmp_path / "job" / ANSWERS_FILE
    first = path.read_bytes().split(b"\n")[:5]
    path.write_bytes(b"\n".join(first) + b"\n")
    asked: list[int] = []
    generate = adapter._generate
    adapter._generate = lambda rows, settings: asked.append(len(rows)) or generate(rows, settings)
    assert adapter.generate_until(requests) == answers and sum(asked) == 7
    # a row whose question has changed is answered anew
    adapter.task_dict[TASK]["dev"][4]["question"] = "Another?"
    adapter.generate_until(requests)
    assert sum(asked) == 8


def test_letters_of_several_tokens_are_refused(adapter: Any) -> None:
    from eval.lmm.likelihood import letter_tokens

    prompt = "USER: Which? ASSISTANT:"
    ids = letter_tokens(adapter.processor.tokenizer, prompt, f"{prompt} A<eos>", ["A", "B"])
    assert [adapter.processor.tokenizer.convert_ids_to_tokens(each) for each in ids.values()] == [["A", "ĠA"], ["B", "ĠB"]]
    with pytest.raises(UserError, match=r"'Z' begins with the tokens \['Ġ', 'Z'\].*--likelihood false"):
        letter_tokens(adapter.processor.tokenizer, prompt, f"{prompt} Z<eos>", ["Z", "B"])


def test_clean_answer() -> None:
    assert clean_answer("B\x07\x1f ASSISTANT: more", ["ASSISTANT:"]) == "B "
