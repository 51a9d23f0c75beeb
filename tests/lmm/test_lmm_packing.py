"""Packing: rows are full and whole, and neither loss nor gradients nor a whole run differ from those without it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlavaForConditionalGeneration, MistralConfig, Qwen2Config

from lift.common.errors import UserError
from lift.common.files import read_json
from lift.common.settings import save_settings
from lmm.batches import Collator
from lmm.build import build
from lmm.combinations import check_combinations
from lmm.conversation import IGNORED_LABEL
from lmm.packing import PackingCollator, pack, refuse_leaks, use_packed_attention
from lmm.settings import BuildSettings, ConversationSource, InstructionTuningSettings, LoraSettings
from lmm.train import train_stage

torch.set_num_threads(1)
SHAPE = {"pad_id": 0, "image_token_id": 3, "tokens_per_image": 16, "image_shape": (3, 32, 32)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("packing") / "model"))


def sample(length: int, images: int = 0, seed: int = 0) -> dict[str, Any]:
    """Random text after the images' tokens; the second half is supervised."""
    generator = torch.Generator().manual_seed(100 * length + seed)
    text = torch.randint(10, 200, (length,), generator=generator).tolist()
    ids = [3] * 16 * images + text
    half = len(ids) - length // 2
    pixels = torch.randn(images, 3, 32, 32, generator=generator) if images else None
    return {"input_ids": ids, "labels": [IGNORED_LABEL] * half + ids[half:], "pixel_values": pixels}


MIXED = [sample(30, 1), sample(9), sample(17, 2), sample(40), sample(5, 1), sample(22, 1, seed=1), sample(12)]
TEXT = [sample(30), sample(9), sample(17)]


def test_rows_hold_every_sample_once_within_the_limit_and_almost_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 1000, 200).tolist()
    rows = pack(lengths, 2048)
    assert sorted(index for row in rows for index in row) == list(range(200))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 2048
    assert sum(filled) / (max(filled) * len(rows)) > 0.97
    assert pack(lengths, 2048) == rows


def test_few_samples_share_rows_evenly() -> None:
    assert pack([50, 40, 30, 30], 100) == [[0, 3], [1, 2]]
    assert pack([10, 10, 10, 10], 100) == [[0, 1, 2, 3]]
    assert pack([90, 20, 20], 100) == [[0], [1, 2]]
    assert pack([300, 20], 100) == [[0], [1]]


def test_positions_restart_and_no_sample_predicts_the_next() -> None:
    first, second = sample(6), sample(4, 1)
    first["labels"] = list(first["input_ids"])
    batch = PackingCollator(**SHAPE, max_length=64)([first, second])
    assert batch["input_ids"].tolist() == [first["input_ids"] + second["input_ids"]]
    assert batch["position_ids"].tolist() == [[*range(6), *range(20)]]
    assert batch["labels"][0, 0] == IGNORED_LABEL
    assert batch["labels"][0, 1:].tolist() == first["labels"][1:] + second["labels"]
    assert torch.equal(batch["pixel_values"], second["pixel_values"])
    assert "attention_mask" not in batch


def test_images_follow_the_order_of_their_tokens() -> None:
    batch = PackingCollator(**SHAPE, max_length=60)(MIXED)
    expected = []
    for row in pack([len(one["input_ids"]) for one in MIXED], 60):
        expected += [MIXED[index]["pixel_values"] for index in row if MIXED[index]["pixel_values"] is not None]
    assert torch.equal(batch["pixel_values"], torch.cat(expected))
    assert int((batch["input_ids"] == 3).sum()) == 16 * 5


def loss_and_gradients(model: Any, batch: dict[str, Any], supervised: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(supervised)).loss
    loss.backward()
    return float(loss), {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_sdpa"])
@pytest.mark.parametrize("samples", [MIXED, TEXT], ids=["mixed", "text"])
def test_loss_and_gradients_equal_those_of_the_padded_batch(attention: str, samples: list[dict[str, Any]], model: Path) -> None:
    started_as = attention.removeprefix("packed_")
    llava: Any = LlavaForConditionalGeneration.from_pretrained(model, attn_implementation=started_as).eval()
    supervised = sum(label != IGNORED_LABEL for one in samples for label in one["labels"])
    padded = Collator(**SHAPE)(samples)
    packed = PackingCollator(**SHAPE, max_length=80, one_row=attention == "packed_sdpa")(samples)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    loss, gradients = loss_and_gradients(llava, padded, supervised)
    if attention == "packed_sdpa":
        assert use_packed_attention(llava)
        assert packed["input_ids"].shape[0] == 1
    packed_loss, packed_gradients = loss_and_gradients(llava, packed, supervised)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    assert any("multi_modal_projector" in name for name in gradients)
    for name, value in gradients.items():
        assert torch.allclose(packed_gradients[name], value, atol=1e-5, rtol=1e-4), name
    if samples is TEXT:
        assert all(not packed_gradients[name].any() for name in gradients if "multi_modal_projector" in name)


def test_with_a_cache_samples_would_leak_and_the_check_says_so(model: Path) -> None:
    llava = LlavaForConditionalGeneration.from_pretrained(model).eval()
    refuse_leaks(lambda **inputs: llava(**inputs).logits, 200, CPU, "sdpa")
    with pytest.raises(UserError, match="see each other"):
        refuse_leaks(lambda **inputs: llava(**(inputs | {"use_cache": True})).logits, 200, CPU, "sdpa")
    with pytest.raises(UserError, match="see each other"):
        refuse_leaks(lambda input_ids, **_: llava(input_ids=input_ids, use_cache=False).logits, 200, CPU, "sdpa")


class Language(torch.nn.Module):
    """A language model where a LLaVA model would have it."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def get_decoder(self) -> Any:
        return self.language_model.base_model


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "one_row"),
    [
        (MistralConfig(**SIZES, **HEADS, sliding_window=4), False),
        (MistralConfig(**SIZES, **HEADS, sliding_window=None), True),
        (Qwen2Config(**SIZES, **HEADS), True),
        (GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32), True),
    ],
    ids=["sliding window", "full attention, grouped queries", "Qwen", "learned positions"],
)
def test_kinds_of_language_models_do_not_leak(config: Any, one_row: bool) -> None:
    model = Language(AutoModelForCausalLM.from_config(config).eval())
    refuse_leaks(lambda **inputs: model.language_model(**inputs).logits, 50, CPU, "sdpa")
    assert use_packed_attention(model) is one_row
    refuse_leaks(lambda **inputs: model.language_model(**inputs).logits, 50, CPU, "packed_sdpa")


@pytest.fixture(scope="module")
def stage(data: Path) -> InstructionTuningSettings:
    source = ConversationSource(annotations=data / "chat.json", images=data / "images")
    return InstructionTuningSettings(
        data=[source], epochs=2, batch_size=3, gradient_accumulation=2, workers=0, logging_steps=1, learning_rate=3e-3,
        max_length=200,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json(folder / "train.json")["losses"]]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_packed_run_has_the_losses_of_the_padded_one(
    zero_stage: int, model: Path, stage: InstructionTuningSettings, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    settings = dataclasses.replace(stage, zero_stage=zero_stage, gradient_checkpointing=zero_stage == 2)
    padded = train_stage(model, tmp_path / "padded", settings)
    packed = train_stage(model, tmp_path / "packed", dataclasses.replace(settings, packing=True))
    assert len(losses(packed)) == 4
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-5)
    one, two = load_file(padded / "model.safetensors"), load_file(packed / "model.safetensors")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    assert "packed" not in (packed / "config.json").read_text()
    assert read_json(packed / "train.json")["fingerprint"] != read_json(padded / "train.json")["fingerprint"]


def test_adapters_train_on_packed_rows_as_on_padded_ones(model: Path, stage: InstructionTuningSettings, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    settings = dataclasses.replace(stage, lora=LoraSettings(rank=4, alpha=8, dropout=0.0), epochs=1)
    padded = train_stage(model, tmp_path / "padded", settings)
    packed = train_stage(model, tmp_path / "packed", dataclasses.replace(settings, packing=True))
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-5)


def test_two_processes_pack_as_one(model: Path, stage: InstructionTuningSettings, tmp_path: Path) -> None:
    """Each process has one of the two micro-batches; cached features, grouped and packed."""
    pytest.importorskip("deepspeed")
    settings = dataclasses.replace(
        stage, packing=True, batching="grouped", cache_features=tmp_path / "cache", max_drop_fraction=0.5
    )
    one = train_stage(model, tmp_path / "one", settings)
    shutil.rmtree(tmp_path / "cache")
    save_settings(dataclasses.replace(settings, gradient_accumulation=1), tmp_path / "stage.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lmm", "train"]
    command = [*launcher, "--config", tmp_path / "stage.yaml", "--model", model, "--out", tmp_path / "two"]
    # Training in this process leaves a launcher's variables in its environment.
    kept = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}}
    done = subprocess.run(
        [str(word) for word in command], env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert len(list((tmp_path / "cache").rglob("*.f16"))) == 8


def test_combinations_that_cannot_work_are_refused(stage: InstructionTuningSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compile: packed rows .* Leave compile or packing out"):
        check_combinations(dataclasses.replace(stage, packing=True, compile=True), {})
    with pytest.raises(UserError, match="cache_features: the vision tower learns"):
        check_combinations(dataclasses.replace(stage, trainable="all", cache_features=tmp_path), {})
