"""LoRA and QLoRA: what is saved is enough, merging keeps the logits, and what cannot work is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lift.common.files import read_jsonl
from lmm.build import build
from lmm.finetune import finetune
from lmm.merge import merge
from lmm.settings import (
    BuildSettings,
    ConversationSource,
    FinetuneSettings,
    InstructionTuningSettings,
    LoraSettings,
    MergeSettings,
    StageSettings,
)
from lmm.train import load_llava, train_stage

pytest.importorskip("deepspeed")
peft = pytest.importorskip("peft")
torch.set_num_threads(1)
LORA = LoraSettings(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("lmm") / "model"))


def chat(data: Path, **changes: Any) -> InstructionTuningSettings:
    source = ConversationSource(annotations=data / "chat.json", images=data / "images")
    values: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "gradient_accumulation": 2, "workers": 0, "logging_steps": 1}
    values |= {"learning_rate": 1e-2, "warmup_ratio": 0.0, "lora": LORA}
    return InstructionTuningSettings(data=[source], **(values | changes))


def logits(model: Any, processor: Any) -> torch.Tensor:
    """Of a text and an image prompt, float32."""
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    ids = processor.tokenizer("<image>" * 16 + "USER: Which colour? ASSISTANT:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=image).logits


@pytest.fixture(scope="module")
def adapter(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_stage(model, tmp_path_factory.mktemp("adapter") / "out", chat(data))


def test_merged_folder_has_the_logits_of_base_and_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge(MergeSettings(adapter=adapter, out=tmp_path / "merged"))
    processor = AutoProcessor.from_pretrained(merged)
    base = load_llava(model, "fp32")
    before = logits(base, processor)
    together = logits(peft.PeftModel.from_pretrained(base, str(adapter)), processor)
    plain = logits(LlavaForConditionalGeneration.from_pretrained(merged), processor)
    assert (together - before).abs().max() > 0.05
    assert (plain - together).abs().max() < 1e-5
    old, new = load_file(model / "model.safetensors"), load_file(merged / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    language = {key for key in old if key.startswith("language_model.model.layers") and "_proj" in key}
    assert changed == language | {key for key in old if key.startswith("multi_modal_projector")}
    assert json.loads((merged / "train.json").read_text())["merged"]["base"] == str(model)


def test_adapter_folder_holds_the_projector_whole_and_names_its_base(model: Path, adapter: Path) -> None:
    weights, projector = load_file(adapter / "adapter_model.safetensors"), load_file(model / "model.safetensors")
    for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
        (key,) = (key for key in weights if key.endswith(f"multi_modal_projector.{name}"))
        assert weights[key].shape == projector[f"multi_modal_projector.{name}"].shape
    assert sum("lora_A" in key for key in weights) == sum("lora_B" in key for key in weights) == 2 * 7
    assert json.loads((adapter / "base.json").read_text())["model"] == str(model)
    with pytest.raises(UserError, match="lmm merge"):
        train_stage(adapter, adapter.with_name("next"), StageSettings())


def test_merging_a_whole_model_says_that_there_is_nothing_to_merge(model: Path) -> None:
    with pytest.raises(UserError, match="holds a whole model, not adapters: there is nothing to merge"):
        merge(MergeSettings(adapter=model))


def test_trained_tower_is_saved_whole_under_zero_3(model: Path, data: Path, tmp_path: Path) -> None:
    lora = LoraSettings(rank=2, alpha=4.0, targets=["q_proj"])
    stage = chat(data, lora=lora, trainable="all", tower_learning_rate=1e-3, zero_stage=3, max_steps=2, save_steps=1)
    merged = merge(MergeSettings(adapter=train_stage(model, tmp_path / "out", stage)))
    old, new = load_file(model / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    language = {key for key in changed if key.startswith("language_model")}
    assert language == {key for key in old if key.startswith("language_model") and "q_proj" in key}
    tower = {key for key in old if key.startswith("vision_tower")}
    unused = {key for key in tower if "layers.2." in key or "post_layernorm" in key}
    still = tower - changed
    assert unused <= still
    assert {key.partition("self_attn.")[2] for key in still - unused} <= {"k_proj.bias"}  # which moves no attention weight
    rate = max(float((new[key] - old[key]).abs().max()) for key in tower)
    assert rate == pytest.approx(1.5e-3, rel=0.1)


@pytest.mark.parametrize(("kind", "zero_stage"), [("nf4", 2), ("nf4", 3), ("int8", 2)])
def test_quantised_training_merges_into_the_full_model(
    kind: str, zero_stage: int, model: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    out = train_stage(model, tmp_path / "out", chat(data, quantise=kind, zero_stage=zero_stage))
    losses = [row["loss"] for row in json.loads((out / "train.json").read_text())["losses"]]
    assert losses[-1] < losses[0] - 0.1
    merged = merge(MergeSettings(adapter=out))
    base = load_llava(model, "fp32")
    processor = AutoProcessor.from_pretrained(merged)
    together = logits(peft.PeftModel.from_pretrained(base, str(out)), processor)
    assert (logits(LlavaForConditionalGeneration.from_pretrained(merged), processor) - together).abs().max() < 1e-5


def test_only_the_language_model_is_quantised(model: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    loaded = load_llava(model, "fp32", "nf4")
    kinds = {name: type(module) for name, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {name for name, kind in kinds.items() if kind is bitsandbytes.nn.Linear4bit}
    assert quantised == {name for name in kinds if name.startswith("model.language_model.")}
    assert len(quantised) == 14


def test_merge_refuses_what_does_not_belong_together(
    model: Path, adapter: Path, tower: Path, llm: Path, tmp_path: Path
) -> None:
    other = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="is not the model that"):
        merge(MergeSettings(adapter=adapter, out=tmp_path / "out", base=other))
    with pytest.raises(UserError, match="record of the base model"):
        merge(MergeSettings(adapter=tmp_path, out=tmp_path / "out"))
    with pytest.raises(UserError, match="exists already"):
        merge(MergeSettings(adapter=adapter, out=model))
    cut = shutil.copytree(adapter, tmp_path / "cut")
    weights = load_file(cut / "adapter_model.safetensors")
    weights.pop(next(key for key in weights if "lora_B" in key))
    save_file(weights, cut / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="expected a weight for every adapter"):
        merge(MergeSettings(adapter=cut, out=tmp_path / "out"))
    (cut / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="expected adapters of rank 4"):
        merge(MergeSettings(adapter=cut, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainable": "projector"}, "adapters train the language model"),
        ({"lora": None, "quantise": "nf4"}, "have no gradient"),
        ({"tower_learning_rate": 1e-5}, "the vision tower is frozen"),
        ({"offload": True}, "Set zero_stage to 3"),
        ({"quantise": "int8", "zero_stage": 3, "offload": True}, "outside the parameter"),
        ({"compile": True, "zero_stage": 3}, "the graph breaks"),
        ({"compile": True, "quantise": "nf4"}, "outside the compiled graph"),
        ({"compile": True, "use_liger_kernel": True}, "Choose compile or use_liger_kernel"),
        ({"lora": LoraSettings(targets=["nothing"])}, "It has down_proj, gate_proj"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        train_stage(model, tmp_path / "out", chat(data, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of a machine without a GPU")
def test_liger_is_refused_without_a_gpu_before_the_first_stage(tower: Path, llm: Path, data: Path, tmp_path: Path) -> None:
    stage = chat(data)
    settings = FinetuneSettings(
        vision_tower=tower, llm=llm, out=tmp_path / "out", stage1=StageSettings(data=stage.data),
        stage2=dataclasses.replace(stage, use_liger_kernel=True),
    )  # fmt: skip
    with pytest.raises(UserError, match="run on a GPU only"):
        finetune(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}])
def test_lora_settings_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora"):
        LoraSettings(**field)


def test_bf16_adapters_train_under_zero_3(model: Path, data: Path, tmp_path: Path) -> None:
    """ZeRO-3 gathers parameters of one format only: float32 adapters on a bfloat16 model would stop it."""
    settings = chat(data, precision="bf16", zero_stage=3, max_steps=1)
    out = train_stage(model, tmp_path / "out", settings)
    weights = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_packed_4_bit_training_has_the_gradient_of_the_padded_one(model: Path, data: Path, tmp_path: Path) -> None:
    """The check for leaks runs the model in evaluation mode, where a 4-bit layer on a CPU would lose its gradient for good."""
    found = []
    for packing in (False, True):
        settings = chat(data, quantise="nf4", packing=packing, max_steps=1, logging_steps=1)
        out = train_stage(model, tmp_path / f"packing_{packing}", settings)
        row = next(row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row)
        found.append((row["loss"], row["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
