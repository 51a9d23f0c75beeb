"""Training under DeepSpeed: what learns, that ZeRO stages, processes and interruptions do not change the result, and that the
folder written is plain transformers'."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_lmm import make_llm, make_tokenizer
from transformers import AutoProcessor, GPT2Config, LlamaConfig, LlavaForConditionalGeneration

from lift.common.errors import Preempted, UserError
from lmm.build import build
from lmm.distributed import CONFIG_FOLDER
from lmm.finetune import finetune
from lmm.folders import context_length
from lmm.settings import BuildSettings, ConversationSource, FinetuneSettings, InstructionTuningSettings, StageSettings
from lmm.train import train_stage
from lmm.trainer import StageTrainer

pytest.importorskip("deepspeed")
torch.set_num_threads(1)


def caption_stage(data: Path, **changes: Any) -> StageSettings:
    """Stage 1: 6 steps of 4 captions."""
    values: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "workers": 0, "logging_steps": 1, "warmup_ratio": 0.0}
    source = ConversationSource(annotations=data / "caption.json", images=data / "images")
    return StageSettings(data=[source], **(values | changes))


def chat_stage(data: Path, **changes: Any) -> InstructionTuningSettings:
    """Stage 2: 6 steps of 4 conversations, of which some micro-batches are text only."""
    values: dict[str, Any] = dataclasses.asdict(caption_stage(data)) | {"template": "chat", "trainable": "projector_and_llm"}
    values |= {"batch_size": 1, "gradient_accumulation": 4, "learning_rate": 3e-3}
    source = ConversationSource(annotations=data / "chat.json", images=data / "images")
    return InstructionTuningSettings(**(values | {"data": [source]} | changes))


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("lmm") / "model"))


@pytest.fixture(scope="module")
def stage2(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference run of the chat stage: one process, ZeRO-2, never interrupted."""
    return train_stage(model, tmp_path_factory.mktemp("reference") / "stage2", chat_stage(data))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "train.json").read_text())["losses"]]


def changed(before: Path, after: Path) -> set[str]:
    """The parts (first component of the key) of which any weight changed."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}


def largest_difference(first: Path, second: Path) -> float:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    return max(float((one[key] - two[key]).abs().max()) for key in one)


def test_finetune_trains_both_stages_and_reuses_what_is_finished(tower: Path, llm: Path, data: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(
        vision_tower=tower, llm=llm, out=tmp_path, stage1=caption_stage(data, learning_rate=1e-2), stage2=chat_stage(data)
    )
    assert finetune(settings) == tmp_path / "stage2"
    assert changed(tmp_path / "build", tmp_path / "stage1") == {"multi_modal_projector"}
    assert changed(tmp_path / "stage1", tmp_path / "stage2") == {"multi_modal_projector", "language_model"}
    for stage in ("stage1", "stage2"):
        assert losses(tmp_path / stage)[-1] < losses(tmp_path / stage)[0]
        assert list((tmp_path / stage / "runs").rglob("events*"))
        assert not (tmp_path / f"{stage}.training").exists()
    record = json.loads((tmp_path / "stage2" / "train.json").read_text())
    assert record["vision_tower_hash"] == json.loads((tmp_path / "build" / "build.json").read_text())["vision_tower_hash"]
    assert (record["samples"], record["dropped"], record["steps"]) == (12, {}, 6)
    answers = [row["conversations"][1]["value"] for row in json.loads((data / "chat.json").read_text())]
    assert record["supervised_tokens"] == sum(len(f" {answer}") + 1 for answer in answers)

    def written() -> list[int]:
        return [(tmp_path / part / "model.safetensors").stat().st_mtime_ns for part in ("build", "stage1", "stage2")]

    before = written()
    finetune(dataclasses.replace(settings, stage2=chat_stage(data, logging_steps=3)))
    assert written() == before
    finetune(dataclasses.replace(settings, stage2=chat_stage(data, learning_rate=1e-3)))
    assert written()[:2] == before[:2] and written()[2] != before[2]


def test_a_signal_at_the_end_of_stage_1_keeps_stage_2_from_starting(
    tower: Path, llm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage1, stage2 = caption_stage(data, max_steps=2), chat_stage(data, max_steps=1)
    settings = FinetuneSettings(vision_tower=tower, llm=llm, out=tmp_path, stage1=stage1, stage2=stage2)
    training_step = StageTrainer.training_step

    def signalled(self: StageTrainer, *args: Any, **keywords: Any) -> torch.Tensor:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", signalled)
        with pytest.raises(Preempted, match="stage1 is finished"):
            finetune(settings)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored until the process ends
    assert (tmp_path / "stage1" / "train.json").is_file()
    assert not (tmp_path / "stage1.training").exists() and not list(tmp_path.glob("stage2*"))
    assert finetune(settings) == tmp_path / "stage2"


def test_samples_beyond_the_positions_show_before_stage_1(
    tower: Path, llm: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    """The tiny language model has 512 positions; one of the conversations is longer."""
    rows = json.loads((data / "chat.json").read_text())
    rows[7]["conversations"][1]["value"] = "." * 600
    (tmp_path / "long.json").write_text(json.dumps(rows))
    source = ConversationSource(annotations=tmp_path / "long.json", images=data / "images")
    long = dataclasses.replace(chat_stage(data), data=[source])
    settings = FinetuneSettings(vision_tower=tower, llm=llm, out=tmp_path / "out", stage1=caption_stage(data), stage2=long)
    with pytest.raises(UserError, match=r"long.json.*\b512 positions.*stage2\.max_length to 512"):
        finetune(settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["build"]
    with pytest.raises(UserError, match=r"512 positions. Set max_length"):
        train_stage(model, tmp_path / "one", long)
    dropping = dataclasses.replace(long, max_length=512, max_drop_fraction=0.1, max_steps=1)
    record = json.loads((train_stage(model, tmp_path / "one", dropping) / "train.json").read_text())
    assert record["dropped"] == {"longer than max_length": 1}


def test_positions_of_a_stretched_rotary_embedding() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=512)) == 512
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert context_length(LlamaConfig(max_position_embeddings=512, rope_parameters=stretched)) == 2048
    assert context_length(GPT2Config(n_positions=32)) == 32


def test_zero_3_gives_the_losses_of_zero_2(model: Path, stage2: Path, data: Path, tmp_path: Path) -> None:
    out = train_stage(model, tmp_path / "out", chat_stage(data, zero_stage=3))
    assert losses(out) == pytest.approx(losses(stage2), rel=1e-5)
    assert largest_difference(out, stage2) < 1e-4


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_tied_embeddings_stay_tied(zero_stage: int, tower: Path, data: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", make_tokenizer(), rows=260, tied=True)
    built = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "model"))
    out = train_stage(built, tmp_path / "out", chat_stage(data, zero_stage=zero_stage, max_steps=1))
    assert weights(out).keys() == weights(built).keys()
    assert not any("lm_head" in key for key in weights(out))


def test_one_large_batch_equals_four_accumulated(model: Path, stage2: Path, data: Path, tmp_path: Path) -> None:
    out = train_stage(model, tmp_path / "out", chat_stage(data, batch_size=4, gradient_accumulation=1))
    assert losses(out) == pytest.approx(losses(stage2), rel=1e-5)


@pytest.mark.parametrize(
    ("fault", "changes", "found"),
    [
        ("loss", {}, "gradients that are not finite"),
        ("loss", {"zero_stage": 3}, "gradients that are not finite"),
        ("gradient", {}, "gradients that are not finite"),
        ("gradient", {"zero_stage": 3}, "gradients that are not finite"),
        ("loss", {"precision": "bf16", "deepspeed": "unchecked.json"}, "a loss of nan"),
        ("loss", {"precision": "bf16", "deepspeed": "unchecked.json", "logging_steps": 1, "save_steps": 100}, "a loss of nan"),
    ],
)
def test_a_diverged_run_stops_and_saves_nothing(
    fault: str, changes: dict[str, Any], found: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 has a loss of nan, or a finite one with gradients that are not."""
    compute_loss = StageTrainer.compute_loss

    def with_fault(self: StageTrainer, module: torch.nn.Module, *args: Any, **keywords: Any) -> Any:
        loss = compute_loss(self, module, *args, **keywords)
        if self.state.global_step == 1:
            nothing = 0 * next(each for each in module.parameters() if each.requires_grad).sum()
            loss = loss + (nothing / 0 if fault == "loss" else (nothing * nothing).sqrt())
        return loss

    monkeypatch.setattr(StageTrainer, "compute_loss", with_fault)
    if "deepspeed" in changes:  # DeepSpeed then takes the step
        config = json.loads((CONFIG_FOLDER / "zero2.json").read_text())
        config["bf16"]["check_grad_overflow"] = False
        (tmp_path / "unchecked.json").write_text(json.dumps(config))
        changes = changes | {"deepspeed": tmp_path / "unchecked.json"}
    settings = chat_stage(data, max_steps=3, **({"logging_steps": 3, "save_steps": 1} | changes))
    with pytest.raises(UserError, match=rf"step 2: {found}.*; the training has diverged.*out\.training holds"):
        train_stage(model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.training").glob("checkpoint-*")] == (
        ["checkpoint-1"] if settings.save_steps == 1 else []
    )


def test_projector_has_its_own_learning_rate(model: Path, stage2: Path, data: Path, tmp_path: Path) -> None:
    slow = train_stage(model, tmp_path / "slow", chat_stage(data, projector_learning_rate=1e-7, max_steps=1))
    fast = train_stage(model, tmp_path / "fast", chat_stage(data, projector_learning_rate=1e-2, max_steps=1))

    def moved(folder: Path, key: str) -> float:
        return float((weights(folder)[key] - weights(model)[key]).abs().max())

    projector = "multi_modal_projector.linear_1.weight"
    assert 0 < moved(slow, projector) < 2e-7
    assert moved(fast, projector) == pytest.approx(1e-2, rel=0.01)
    language = next(key for key in weights(model) if "q_proj.weight" in key)
    assert moved(slow, language) == pytest.approx(moved(fast, language), rel=1e-3) == pytest.approx(3e-3, rel=0.01)


def test_bf16_trains_and_is_written_as_bf16(model: Path, data: Path, tmp_path: Path) -> None:
    out = train_stage(model, tmp_path / "out", chat_stage(data, precision="bf16", template="vicuna_v1", zero_stage=3))
    assert losses(out)[-1] < losses(out)[0]
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert LlavaForConditionalGeneration.from_pretrained(out).dtype == torch.bfloat16
    assert "curious user" in AutoProcessor.from_pretrained(out).chat_template


CHILD = """
import json, os, signal, sys
from pathlib import Path
import lmm.trainer as trainer
from lmm.quiet import quiet
from lmm.settings import ConversationSource, InstructionTuningSettings
from lmm.train import train_stage
from lmm.trainer import StageTrainer
quiet()
arguments = json.loads(sys.argv[1])
mark = trainer.mark_complete
def mark_or_die(checkpoint, world_size):
    if checkpoint.name == arguments["die_at"]:
        os.kill(os.getpid(), signal.SIGKILL)
    mark(checkpoint, world_size)
trainer.mark_complete = mark_or_die
values = arguments["settings"]
values["data"] = [ConversationSource(annotations=Path(s["annotations"]), images=Path(s["images"])) for s in values["data"]]
train_stage(Path(arguments["model"]), Path(arguments["out"]), InstructionTuningSettings(**values))
"""


def run_child(
    model: Path, out: Path, settings: StageSettings, processes: int = 1, die_at: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    values = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    script = out.parent / "child.py"
    script.write_text(CHILD)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = json.dumps({"model": str(model), "out": str(out), "settings": values, "die_at": die_at})
    # In-process training leaves these in the environment of the tests.
    kept = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}}
    return subprocess.run(
        [*launcher, str(script), arguments],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_killed_run_goes_on_to_the_same_weights(model: Path, stage2: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = run_child(model, out, chat_stage(data, save_steps=2), die_at="checkpoint-4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    left = sorted(path.name for path in (tmp_path / "out.training").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(UserError, match="other settings"):
        train_stage(model, out, chat_stage(data, save_steps=2, learning_rate=1.0))
    train_stage(model, out, chat_stage(data, save_steps=2))
    assert json.loads((out / "train.json").read_text())["resumed_from"] == "checkpoint-2"
    assert largest_difference(out, stage2) == 0
    assert losses(out) == losses(stage2)


def test_two_processes_equal_one_without_a_compiler(model: Path, stage2: Path, data: Path, tmp_path: Path) -> None:
    extensions = tmp_path / "extensions"
    (extensions / "deepspeed_shm_comm").mkdir(parents=True)
    (extensions / "deepspeed_shm_comm" / "lock").touch()
    out = tmp_path / "out"
    settings = chat_stage(data, gradient_accumulation=2, logging_steps=4)
    path = str(Path(sys.executable).parent)
    done = run_child(model, out, settings, processes=2, PATH=path, TORCH_EXTENSIONS_DIR=str(extensions))
    assert done.returncode == 0, done.stderr
    one = losses(stage2)
    assert losses(out) == pytest.approx([sum(one[:4]) / 4, sum(one[4:]) / 2], rel=1e-5)
    assert largest_difference(out, stage2) < 1e-4
    assert [p.name for p in extensions.rglob("*")] == ["deepspeed_shm_comm", "lock"]


PLAIN = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lift", "lmm", "eval"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
for name in ("lift", "lmm", "eval"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is importable")
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
model, info = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(sys.argv[1])
message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
prompt = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(text=[prompt] * 2, images=[Image.new("RGB", (40, 30))] * 2, return_tensors="pt", padding=True)
output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
assert output.shape[1] > inputs["input_ids"].shape[1]
print("generated", processor.batch_decode(output))
"""


def test_result_loads_and_generates_without_our_packages(stage2: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(stage2)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("generated")


def test_bad_inputs_are_user_errors(model: Path, stage2: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        train_stage(tmp_path / "none", tmp_path / "out", chat_stage(data))
    with pytest.raises(UserError, match="is there, but not from these settings"):
        train_stage(model, stage2, chat_stage(data, seed=1))
    with pytest.raises(UserError, match="max_drop_fraction"):
        train_stage(model, tmp_path / "out", chat_stage(data, max_length=40))
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.training" / "dropped.jsonl").read_text().splitlines()) > 0
    with pytest.raises(UserError, match="no usable sample"):
        train_stage(model, tmp_path / "out", chat_stage(data, max_length=5, max_drop_fraction=1.0))
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    with pytest.raises(UserError, match="'optimizer'"):
        train_stage(model, tmp_path / "out", chat_stage(data, deepspeed=config))
    config.write_text(json.dumps({"train_batch_size": 8}))
    with pytest.raises(UserError, match="train_batch_size"):
        train_stage(model, tmp_path / "out", chat_stage(data, deepspeed=config))
