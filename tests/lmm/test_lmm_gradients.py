"""One step of plain SGD shows the gradient itself, which AdamW would hide: it is that of the mean over all supervised tokens,
however the samples are spread over micro-batches and processes. And the learning rates and records by which a run is judged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lmm.train
import lmm.trainer
from lift.common.errors import UserError
from lift.common.settings import save_settings
from lmm.build import build
from lmm.data import load_image
from lmm.folders import tower_hash
from lmm.processor import set_aspect_ratio
from lmm.settings import BuildSettings, ConversationSource, InstructionTuningSettings
from lmm.train import load_llava, load_processor, train_stage

pytest.importorskip("deepspeed")
torch.set_num_threads(1)
ORDER = np.random.default_rng([0, 0]).permutation(8).tolist()
"""The order of the first epoch of 8 samples with seed 0; with two processes the first takes every other one."""


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("lmm") / "model"))


@pytest.fixture(scope="module")
def eight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations with answers of very unequal length; the second of two processes gets those without image."""
    folder = tmp_path_factory.mktemp("eight")
    rows = json.loads((data / "chat.json").read_text())[:8]
    for place, number in enumerate(ORDER):
        question = "Which colour?" if place % 2 else "<image>\nWhich colour?"
        rows[number]["conversations"] = [
            {"from": "human", "value": question}, {"from": "gpt", "value": "It is" + " so" * number}
        ]  # fmt: skip
        rows[number].pop("image", None)
        if place % 2 == 0:
            rows[number]["image"] = f"{number}.png"
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder / "chat.json"


def one_step(eight: Path, data: Path, **changes: Any) -> InstructionTuningSettings:
    values: dict[str, Any] = {"max_steps": 1, "batch_size": 1, "gradient_accumulation": 8, "workers": 0, "logging_steps": 1}
    values |= {"learning_rate": 0.1, "warmup_ratio": 0.0, "gradient_clip": 0.0}
    return InstructionTuningSettings(data=[ConversationSource(annotations=eight, images=data / "images")], **(values | changes))


def plain_sgd(groups: list[dict[str, Any]], settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate)


@pytest.fixture(scope="module")
def gradients(model: Path, eight: Path, data: Path) -> dict[str, torch.Tensor]:
    """By plain PyTorch, one conversation at a time: the sum of the tokens' cross-entropies over their number."""
    processor, _ = load_processor(model)
    set_aspect_ratio(processor, "pad")
    plain = load_llava(model, "fp32").eval()
    total, count = torch.zeros(()), 0
    for row in json.loads(eight.read_text()):
        question, answer = (turn["value"] for turn in row["conversations"])
        prompt = "USER: " + question.replace("<image>", "<image>" * 16) + " ASSISTANT:"
        ids = processor.tokenizer(prompt + f" {answer}")["input_ids"] + [processor.tokenizer.eos_token_id]
        supervised = len(f" {answer}") + 1
        pixels = None
        if "image" in row:
            picture = load_image(data / "images" / row["image"])
            pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        logits = plain(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total, count = total + losses[-supervised:].sum(), count + supervised
    (total / count).backward()
    return {
        name: parameter.grad
        for name, parameter in plain.named_parameters()
        if parameter.grad is not None and "tower" not in name
    }


def steps_taken(model: Path, out: Path) -> dict[str, torch.Tensor]:
    """By parameter name in memory, divided by the learning rate of 0.1 and negated: the gradient."""
    before, after = (dict(load_llava(folder, "fp32").named_parameters()) for folder in (model, out))
    return {name: ((before[name] - after[name]) / 0.1).detach() for name in before if "tower" not in name}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0.1
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5 * max(1.0, largest)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_gradient_is_that_of_the_mean_over_tokens(
    batch_size: int, accumulation: int, model: Path, eight: Path, data: Path, tmp_path: Path,
    gradients: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lmm.trainer, "make_optimizer", plain_sgd)
    settings = one_step(eight, data, batch_size=batch_size, gradient_accumulation=accumulation)
    out = train_stage(model, tmp_path / "out", settings)
    assert_close(steps_taken(model, out), gradients)


TWO = """
import dataclasses, sys
from pathlib import Path
import torch
import lmm.train
import lmm.trainer
from lift.common.settings import parse_settings
from lmm.quiet import quiet
from lmm.processor import set_aspect_ratio
from lmm.settings import InstructionTuningSettings
from lmm.train import train_stage
quiet()
lmm.trainer.make_optimizer = lambda groups, settings: torch.optim.SGD(groups, lr=settings.learning_rate)
settings = parse_settings(InstructionTuningSettings, ["--config", sys.argv[3]], "", "")
for zero_stage in (2, 3):
    out = Path(sys.argv[2]) / f"zero{zero_stage}"
    train_stage(Path(sys.argv[1]), out, dataclasses.replace(settings, zero_stage=zero_stage))
"""


def test_two_processes_of_which_one_has_text_only(
    model: Path, eight: Path, data: Path, tmp_path: Path, gradients: dict[str, torch.Tensor]
) -> None:
    """Under ZeRO-2 and ZeRO-3 neither hangs, and the gradient is that of all eight conversations."""
    rows = json.loads(eight.read_text())
    assert [["image" in rows[number] for number in ORDER[rank::2]] for rank in (0, 1)] == [[True] * 4, [False] * 4]
    save_settings(one_step(eight, data, gradient_accumulation=4), tmp_path / "stage.yaml")
    (tmp_path / "two.py").write_text(TWO)
    kept = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "two.py"),
         str(model), str(tmp_path), str(tmp_path / "stage.yaml")],
        env=kept | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for zero_stage in (2, 3):
        assert_close(steps_taken(model, tmp_path / f"zero{zero_stage}"), gradients)


def test_each_part_has_its_own_learning_rate(model: Path, eight: Path, data: Path, tmp_path: Path) -> None:
    """AdamW's first step moves every weight with a gradient by its learning rate."""
    settings = one_step(
        eight, data, trainable="all", projector_learning_rate=1e-2, learning_rate=1e-3, tower_learning_rate=1e-4
    )
    out = train_stage(model, tmp_path / "out", settings)
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for part, rate in (("multi_modal_projector", 1e-2), ("language_model", 1e-3), ("vision_tower", 1e-4)):
        moved = max(float((new[key] - old[key]).abs().max()) for key in old if key.startswith(part))
        assert moved == pytest.approx(rate, rel=0.01), part
    frozen = {key for key in old if torch.equal(old[key], new[key])}
    assert {key for key in old if "vision_tower" in key and ("layers.2." in key or "post_layernorm" in key)} <= frozen
    record = json.loads((out / "train.json").read_text())
    assert record["vision_tower_weights_hash"] == tower_hash(model) != tower_hash(out)


def test_supervised_tokens_of_every_step_are_logged(model: Path, eight: Path, data: Path, tmp_path: Path) -> None:
    settings = one_step(eight, data, trainable="projector", max_steps=5, batch_size=4, gradient_accumulation=1, logging_steps=3)
    out = train_stage(model, tmp_path / "out", settings)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counts = {row["step"]: row["supervised_tokens"] for row in rows if "supervised_tokens" in row}
    lengths = [len(" It is" + " so" * number) + 1 for number in range(8)]
    expected = []
    for epoch in range(3):
        order = np.random.default_rng([0, epoch]).permutation(8)
        expected += [sum(lengths[number] for number in half) for half in (order[:4], order[4:])]
    assert counts == dict(zip(range(1, 6), expected, strict=False))
    assert [row["step"] for row in rows if "loss" in row] == [3, 5]


def test_all_labels_masked_stops_the_run(
    model: Path, eight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Masked(lmm.train.ConversationDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            return sample | {"labels": [-100] * len(sample["labels"])}

    monkeypatch.setattr(lmm.train, "ConversationDataset", Masked)
    with pytest.raises(UserError, match="step 1: every label is masked"):
        train_stage(model, tmp_path / "out", one_step(eight, data, trainable="projector"))
    assert not (tmp_path / "out").exists()


def test_unfit_models_are_refused(model: Path, eight: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "tower")
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 24
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"linear_1.weight is 32 x 16, but .* vision tower of hidden size 24"):
        train_stage(other, tmp_path / "out", one_step(eight, data))
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(UserError, match=r"bare/config.json: expected a LLaVA model's configuration"):
        train_stage(bare, tmp_path / "out", one_step(eight, data))
    lacking = shutil.copytree(model, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    weights.pop(next(key for key in weights if "vision_tower" in key))
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"misshapen are .*vision_tower"):
        train_stage(lacking, tmp_path / "out", one_step(eight, data))
    unpadded = shutil.copytree(model, tmp_path / "unpadded")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (unpadded / name).is_file():
            values = json.loads((unpadded / name).read_text())
            values.pop("pad_token", None)
            (unpadded / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match="no pad token"):
        train_stage(unpadded, tmp_path / "out", dataclasses.replace(one_step(eight, data), seed=1))


def test_offloading_and_8_bit_optimizer_train(model: Path, eight: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    common: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 3e-3}
    runs = {
        "plain": one_step(eight, data, **common),
        "offload": one_step(eight, data, **common, zero_stage=3, offload=True),
        "8bit": one_step(eight, data, **common, optimizer="adamw_8bit"),
    }
    losses = {}
    for name, settings in runs.items():
        out = train_stage(model, tmp_path / name, settings)
        losses[name] = [row["loss"] for row in json.loads((out / "train.json").read_text())["losses"]]
    assert losses["plain"][-1] < losses["plain"][0] - 0.2
    assert losses["offload"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["8bit"] != losses["plain"]
    assert losses["8bit"] == pytest.approx(losses["plain"], rel=2e-3)
