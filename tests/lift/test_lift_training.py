"""Training steps: micro-batches, patch dropout, negatives, options that must not change the weights; validation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import tiny_pretrain
from torch import nn

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.data import Pairs, make_loader
from lift.embed import embed
from lift.export import export_encoder
from lift.model import kept_patches, mean_patch_feature, parameter_groups
from lift.run_folder import best_checkpoints, checkpoints
from lift.settings import EmbedSettings, NegativeSettings, PretrainSettings, SourceSettings, ValidationSettings
from lift.sources import Samples, read_sources
from lift.step import TrainingStep
from lift.store import EmbeddingStore
from lift.train import _set_up, open_accelerator, pretrain
from lift.validation import recall_at_1


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def gradients(settings: PretrainSettings) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step of a new model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = open_accelerator(settings)
    samples = Samples(read_sources(settings.data, DropLedger()))
    settings.out.mkdir(exist_ok=True)
    setup = _set_up(settings, accelerator, samples, DropLedger())
    batch = next(iter(make_loader(Pairs(samples, settings), settings, setup.text_side, range(1), 0, 1)))
    batch.valid_B[2] = False
    step = TrainingStep(settings, accelerator, setup.model, setup.model)
    loss = float(step(0, batch))
    AcceleratorState._reset_state(reset_partial_state=True)
    return loss, {name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None}


@pytest.fixture
def with_negatives(pairs: Path, tiny_llm: Path, tmp_path: Path) -> NegativeSettings:
    """A bank of 24 captions, and one hard negative for each image but one."""
    for name in ("bank", "hard"):
        lines = [{"key": f"webdataset/{i:09d}#0", "caption": f"{name} number {i}"} for i in range(24 if name == "bank" else 23)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        encoder = tiny_pretrain(pairs, tiny_llm, tmp_path).text_encoder
        embed(EmbedSettings(captions=tmp_path / f"{name}.jsonl", out=tmp_path / name, text_encoder=encoder))
    return NegativeSettings(bank=tmp_path / "bank", bank_rows=10, hard=tmp_path / "hard", hard_per_image=2)


@pytest.mark.parametrize("objective", ["contrastive", "cosine", "sigmoid", "clip"])
@pytest.mark.parametrize("micro", [3, 4])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str, micro: int, with_negatives: NegativeSettings
) -> None:
    settings = replace(tiny_pretrain(pairs, tiny_llm, tmp_path / "run", objective), patch_dropout=0.5)
    if objective in ("contrastive", "sigmoid"):
        settings = replace(settings, negatives=with_negatives)
    loss, whole = gradients(settings)
    loss_in_parts, parts = gradients(replace(settings, micro_batch_size=micro))
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == parts.keys() and len(whole) > 30
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6 * max(1, float(gradient.abs().max())), rtol=1e-4)


def test_negatives_change_the_loss_and_need_no_encoder_pass(
    pairs: Path, tiny_llm: Path, tmp_path: Path, with_negatives: NegativeSettings
) -> None:
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path / "run")
    plain, _ = gradients(settings)
    only_bank, _ = gradients(replace(settings, negatives=replace(with_negatives, hard=None)))
    both, _ = gradients(replace(settings, negatives=with_negatives))
    assert plain < only_bank < both
    pretrain(replace(settings, negatives=with_negatives))
    with pytest.raises(UserError, match="expected keys such as 'webdataset/0000000"):
        gradients(replace(settings, negatives=NegativeSettings(hard=settings.embeddings and _other(tmp_path, tiny_llm, pairs))))


def _other(folder: Path, llm: Path, pairs: Path) -> Path:
    (folder / "other.txt").write_text("a caption\n")
    embed(
        EmbedSettings(
            captions=folder / "other.txt", out=folder / "other", text_encoder=tiny_pretrain(pairs, llm, folder).text_encoder
        )
    )
    return folder / "other"


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_diverged_run_stops_and_saves_nothing(pairs: Path, tiny_llm: Path, tmp_path: Path, log_every: int) -> None:
    settings = replace(tiny_pretrain(pairs, tiny_llm, tmp_path / "run"), log_every=log_every, checkpoint_every=1)
    with pytest.raises(UserError, match=r"step 2: loss is nan, .* --learning_rate; .*run holds the checkpoints"):
        pretrain(replace(settings, learning_rate=1e30, warmup_steps=0))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000001"]


@pytest.mark.parametrize("objective", ["contrastive", "clip"])
def test_checkpointing_keeps_the_gradients_and_bf16_is_near(
    pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str
) -> None:
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path / "run", objective)
    loss, plain = gradients(settings)
    again, checkpointed = gradients(replace(settings, gradient_checkpointing=True, loss_tile=3))
    assert again == pytest.approx(loss, abs=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4)
    half, _ = gradients(replace(settings, precision="bf16"))
    assert half == pytest.approx(loss, rel=0.05) and half != loss


def test_patches_are_dropped_alike_whatever_the_processes(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    settings = replace(tiny_pretrain(pairs, tiny_llm, tmp_path), patch_dropout=0.25)
    assert kept_patches(replace(settings, patch_dropout=0.0), 0, 0, 1) is None
    whole = kept_patches(settings, 5, 0, 1)
    assert whole is not None and whole.shape == (8, 3)
    assert all(len(set(row.tolist())) == 3 for row in whole)
    halves = [kept_patches(settings, 5, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)  # type: ignore[arg-type]
    assert not torch.equal(kept_patches(settings, 6, 0, 1), whole)  # type: ignore[arg-type]


def test_keeping_all_patches_in_any_order_is_the_plain_feature(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    from lift.model import LiftModel, vision_config
    from lift.transforms import TextTransform

    torch.manual_seed(0)
    vision = LiftModel(vision_config(tiny_pretrain(pairs, tiny_llm, tmp_path).vision), TextTransform("none", 8)).vision
    pixels = torch.randn(2, 3, 16, 16)
    kept = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    torch.testing.assert_close(mean_patch_feature(vision, pixels, kept), mean_patch_feature(vision, pixels), atol=1e-6, rtol=0)
    assert not torch.allclose(mean_patch_feature(vision, pixels, kept[:, :2]), mean_patch_feature(vision, pixels), atol=1e-3)


def test_weight_decay_spares_gains_biases_and_the_temperature(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    from lift.model import LiftModel, vision_config
    from lift.transforms import TextTransform

    model = LiftModel(vision_config(tiny_pretrain(pairs, tiny_llm, tmp_path).vision), TextTransform("none", 8), bias=0.0)
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.2))
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim >= 2), name
        assert (id(parameter) in spared) == (parameter.ndim < 2), name
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert all(id(norm.weight) in spared for norm in norms) and id(model.log_scale) in spared


def test_recall_by_hand() -> None:
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1.0]])
    recall = recall_at_1(image, text)
    # images: 0 (1.0 > 0.9), 1 (0.1 > 0), 2; texts: 0, 2, while text 1 is nearer to image 0
    assert recall["validation_image_to_text_recall"] == 1.0
    assert recall["validation_text_to_image_recall"] == pytest.approx(2 / 3)
    assert recall["validation_recall"] == pytest.approx(5 / 6)
    tied = recall_at_1(torch.ones(2, 1), torch.ones(2, 1))
    assert tied["validation_recall"] == 0


@pytest.mark.parametrize("objective", ["contrastive", "cosine", "sigmoid", "clip"])
def test_validation_is_logged_and_the_best_checkpoint_kept(pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str) -> None:
    held_out = SourceSettings(kind="webdataset", path=str(pairs / "00001.tar"), name="held_out")
    settings = replace(
        tiny_pretrain(pairs, tiny_llm, tmp_path / "run", objective),
        validation=ValidationSettings(data=[held_out], every=5, samples=10, best="loss"),
    )
    pretrain(settings)
    logged = {row["step"]: row for row in rows(settings.out) if "validation_loss" in row}
    assert list(logged) == [5, 10, 12]
    assert all(0 <= row["validation_recall"] <= 1 and np.isfinite(row["validation_loss"]) for row in logged.values())
    (kept_folder,) = best_checkpoints(settings.out)
    best = json.loads((kept_folder / "state.json").read_text())
    lowest = min(logged.values(), key=lambda row: row["validation_loss"])
    assert (best["step"], best["validation_loss"]) == (lowest["step"], lowest["validation_loss"])
    if best["step"] == 12:
        last = load_file(checkpoints(settings.out)[-1] / "model.safetensors")
        kept = load_file(kept_folder / "model.safetensors")
        assert all(torch.equal(last[name], kept[name]) for name in last)
    export_encoder(settings.out, tmp_path / "best", "best")
    assert json.loads((tmp_path / "best" / "lift_config.json").read_text())["step"] == best["step"]
    if objective != "clip":
        assert len(EmbeddingStore(settings.out / "validation_embeddings")) == 24


def test_validation_pair_that_cannot_be_used_is_an_error(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    from tiny import write_tar

    write_tar(tmp_path / "held_out.tar", {"a.png": b"no image", "a.txt": b"a caption"})
    held_out = SourceSettings(kind="webdataset", path=str(tmp_path / "held_out.tar"), name="held_out")
    settings = replace(
        tiny_pretrain(pairs, tiny_llm, tmp_path / "run", "clip"), validation=ValidationSettings(data=[held_out], every=2)
    )
    with pytest.raises(UserError, match="the image of held_out/a cannot be used"):
        pretrain(settings)
