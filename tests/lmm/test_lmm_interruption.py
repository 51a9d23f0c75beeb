"""SIGKILL at random instants, then the same command: bit-identical weights, for both stages, with and without LoRA, under
ZeRO-2 and ZeRO-3; and what is on disk at the end of every save loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_lmm_runs import LAUNCHER, train_in_this_process
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lift.common.settings import save_settings
from lmm.build import build
from lmm.checkpoints import COMPLETE, mark_complete, newest_complete, remove_incomplete
from lmm.settings import (
    BuildSettings,
    ConversationSource,
    InstructionTuningSettings,
    LoraSettings,
    StageSettings,
    TrainSettings,
)
from lmm.train import load_llava, train_stage

pytest.importorskip("deepspeed")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("lmm") / "model"))


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_lmm_runs"])
    return context


def stage(data: Path, kind: str, zero_stage: int, **changes: Any) -> StageSettings:
    values: dict[str, Any] = {"max_steps": 12, "batch_size": 2, "workers": 0, "logging_steps": 1, "save_steps": 3}
    values |= {"zero_stage": zero_stage, "learning_rate": 3e-3} | changes
    name = "caption" if kind == "stage1" else "chat"
    source = ConversationSource(annotations=data / f"{name}.json", images=data / "images")
    if kind == "stage1":
        return StageSettings(data=[source], **values)
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.3) if kind == "lora" else None
    return InstructionTuningSettings(data=[source], lora=lora, **values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def steps_so_far(out: Path) -> int:
    metrics = out.with_name(out.name + ".training") / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


@pytest.mark.timeout(900)
def test_killed_at_random_instants_in_six_trials(model: Path, data: Path, tmp_path: Path, processes: Any) -> None:
    """The instant is drawn as a step and a time after it, so that a busy machine does not move it to the start."""
    instants = random.Random(0)
    killed, resumed = 0, 0
    for kind, zero_stage in itertools.product(("stage1", "stage2", "lora"), (2, 3)):
        settings = stage(data, kind, zero_stage)
        whole, cut = (tmp_path / f"{kind}{zero_stage}_{name}" for name in ("whole", "cut"))
        process = processes.Process(target=train_in_this_process, args=(model, cut, settings))
        process.start()
        steps, delay = instants.randint(0, 11), instants.uniform(0.0, 0.5)
        while steps_so_far(cut) < steps and process.is_alive():
            time.sleep(0.01)
        process.join(delay)
        killed += process.is_alive()
        process.kill()
        process.join()
        for out in (whole, cut):
            train_stage(model, out, settings)
        one, two = weights(whole), weights(cut)
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == [], (kind, zero_stage)
        records = [json.loads((out / "train.json").read_text()) for out in (whole, cut)]
        losses = [[row["loss"] for row in record["losses"]] for record in records]
        assert losses[0] == losses[1] and len(losses[1]) == 12
        resumed += records[1]["resumed_from"] is not None
    assert killed >= 3
    assert resumed >= 2


def test_preemption_saves_and_asks_to_be_requeued(model: Path, data: Path, tmp_path: Path) -> None:
    """SIGTERM to the process and its loader's worker; the same command then ends with the weights of a run left alone."""
    changes: dict[str, Any] = {"max_steps": 40, "workers": 1, "save_steps": 1000}
    settings = stage(data, "stage2", 2, **changes)
    cut = tmp_path / "cut"
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    save_settings(TrainSettings(model=model, out=cut, **values), tmp_path / "cut.yaml")
    command = [sys.executable, "-m", "lmm", "train", "--config", str(tmp_path / "cut.yaml")]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while steps_so_far(cut) < 3:
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    _, message = process.communicate()
    assert process.returncode == 75, message
    saved = newest_complete(tmp_path / "cut.training", 1)
    assert saved is not None and not cut.exists()
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 3 <= step < 40 and f"stopped: asked to end; saved step {step}." in message.splitlines()[-1]
    for out in (cut, tmp_path / "whole"):
        train_stage(model, out, settings)
    assert json.loads((cut / "train.json").read_text())["resumed_from"] == saved.name
    one, two = weights(tmp_path / "whole"), weights(cut)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("kind", ["stage2", "lora"])
def test_every_save_leaves_a_model_that_loads(kind: str, model: Path, data: Path, tmp_path: Path, processes: Any) -> None:
    """Under ZeRO-3, where the weights have to be gathered: the run is killed after its first save."""
    process = processes.Process(
        target=train_in_this_process, args=(model, tmp_path / "out", stage(data, kind, 3, max_steps=600))
    )
    process.start()
    while newest_complete(tmp_path / "out.training", 1) is None:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    saved = newest_complete(tmp_path / "out.training", 1)
    assert saved is not None
    ids = torch.tensor([[1, 5, 6, 7]])
    if kind == "lora":
        base = load_llava(model, "fp32")
        before = base(input_ids=ids).logits
        loaded = peft.PeftModel.from_pretrained(base, str(saved)).eval()
    else:
        before = load_llava(model, "fp32")(input_ids=ids).logits
        loaded, info = LlavaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
        assert not any(info.values())
    assert (loaded(input_ids=ids).logits - before).abs().max() > 1e-4
    assert AutoProcessor.from_pretrained(saved).image_token == "<image>"


def test_a_save_cut_in_the_middle_is_skipped_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (3, 6, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"0123456789")
        mark_complete(folder, 1)
    (tmp_path / "checkpoint-9" / "weights").write_bytes(b"0123")
    (tmp_path / "checkpoint-6" / COMPLETE).unlink()
    assert newest_complete(tmp_path, 1) == tmp_path / "checkpoint-3"
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/checkpoint-{step}: incomplete, removed" for step in (6, 9)]
