"""The order of the samples: grouped, balanced, a function of (seed, epoch) alone, and exact after an interruption."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lift.common.files import read_json
from lift.common.ledger import DropLedger
from lmm.batches import BalancedSampler, EpochSampler, GroupedSampler, make_sampler
from lmm.build import build
from lmm.data import check_samples, read_sources
from lmm.settings import BuildSettings, ConversationSource, InstructionTuningSettings, StageSettings
from lmm.train import load_processor, make_encoder, train_stage

torch.set_num_threads(1)
GENERATOR = np.random.default_rng(0)
IMAGES = (GENERATOR.random(1003) < 0.9).astype(int)
LENGTHS = np.where(IMAGES, GENERATOR.integers(600, 1000, 1003), GENERATOR.integers(10, 2048, 1003))
BATCH, BATCHES_PER_STEP = 4, 6


def batched(order: Iterable[int], size: int) -> list[tuple[int, ...]]:
    items = list(order)
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def grouped(seed: int = 0, epoch: int = 0) -> GroupedSampler:
    sampler = GroupedSampler(LENGTHS.tolist(), IMAGES.tolist(), seed, BATCH, BATCHES_PER_STEP)
    sampler.set_epoch(epoch)
    return sampler


def padding(order: list[int]) -> float:
    """Share of padding in micro-batches of BATCH samples."""
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batched(order, BATCH))
    return 1 - float(LENGTHS.sum()) / float(padded)


@pytest.mark.parametrize("epoch", [0, 1])
def test_groups_are_alike_and_complete(epoch: int) -> None:
    order = list(grouped(epoch=epoch))
    assert sorted(order) == list(range(1003))
    batches = list(batched(order, BATCH))
    assert sum(len({int(IMAGES[index]) for index in batch}) > 1 for batch in batches) <= 1
    whole_steps = int((IMAGES == 1).sum()) // 24 + int((IMAGES == 0).sum()) // 24
    steps = list(batched(order, BATCH * BATCHES_PER_STEP))[:whole_steps]
    assert all(len({int(IMAGES[index]) for index in step}) == 1 for step in steps)
    spread = [max(LENGTHS[list(step)]) - min(LENGTHS[list(step)]) for step in steps if IMAGES[step[0]]]
    assert np.mean(spread) < 0.1 * 400
    assert padding(order) < 0.03 < 0.2 < padding(list(EpochSampler(1003, 0)))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    used = grouped()
    list(used)
    used.set_epoch(2)
    assert list(used) == list(grouped(epoch=2))
    orders = {tuple(grouped(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_the_same_with_any_number_of_workers(workers: int) -> None:
    loader = DataLoader(LENGTHS.tolist(), batch_size=BATCH, sampler=grouped(), num_workers=workers, collate_fn=list)
    assert [length for batch in loader for length in batch] == LENGTHS[list(grouped())].tolist()


def test_balancing_moves_samples_within_their_step_only() -> None:
    plain = EpochSampler(1003, 5)
    balanced = BalancedSampler(EpochSampler(1003, 5), LENGTHS.tolist(), BATCH, BATCHES_PER_STEP)
    for epoch in (0, 3):
        plain.set_epoch(epoch)
        balanced.set_epoch(epoch)
        before = list(batched(plain, BATCH * BATCHES_PER_STEP))
        after = list(batched(balanced, BATCH * BATCHES_PER_STEP))
        assert [sorted(step) for step in after] == [sorted(step) for step in before]

        def spread(steps: list[tuple[int, ...]]) -> float:
            """Mean over the steps of the largest over the smallest micro-batch, in tokens."""
            totals = [[LENGTHS[list(batch)].sum() for batch in batched(step, BATCH)] for step in steps[:-1]]
            return float(np.mean([max(total) / min(total) for total in totals]))

        assert spread(after) < 1.2 < 1.4 < spread(before)


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("batches") / "model"))


@pytest.fixture(scope="module")
def stage(data: Path) -> InstructionTuningSettings:
    """Two epochs of two steps, grouped: resuming at step 3 lies in the second epoch."""
    source = ConversationSource(annotations=data / "chat.json", images=data / "images")
    return InstructionTuningSettings(
        data=[source], epochs=2, batch_size=2, gradient_accumulation=3, workers=0, logging_steps=1, save_steps=3,
        learning_rate=3e-3, batching="grouped",
    )  # fmt: skip


def test_the_check_gives_the_lengths_that_grouping_takes(model: Path, stage: InstructionTuningSettings) -> None:
    processor, llava = load_processor(model)
    encoder = make_encoder(processor, llava, stage, model)
    rows, _ = check_samples(read_sources(stage.data), encoder, DropLedger(), workers=0)
    assert rows.images.tolist() == [int(number % 3 > 0) for number in range(12)]
    assert rows.lengths[3] - rows.lengths[0] == len("It is white...") - len("It is red")
    for batching, packing, kind in (
        ("random", False, EpochSampler),
        ("grouped", False, GroupedSampler),
        ("grouped", True, BalancedSampler),
    ):
        settings: StageSettings = dataclasses.replace(stage, batching=batching, packing=packing)
        sampler = make_sampler(settings, rows, 3)
        assert type(sampler) is kind
        assert sorted(sampler) == list(range(12))


def test_a_grouped_and_packed_run_goes_on_exactly(
    model: Path, stage: InstructionTuningSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    settings = dataclasses.replace(stage, packing=True)
    whole = train_stage(model, tmp_path / "whole", settings)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("lmm.train._finish", interrupted)
        train_stage(model, tmp_path / "resumed", settings)
    checkpoints = sorted((tmp_path / "resumed.training").glob("checkpoint-*"))
    assert "checkpoint-3" in {path.name for path in checkpoints}
    for path in checkpoints:
        if path.name != "checkpoint-3":
            (path / "complete.json").unlink(missing_ok=True)
    resumed = train_stage(model, tmp_path / "resumed", settings)
    record = read_json(resumed / "train.json")
    assert record["resumed_from"] == "checkpoint-3"
    assert record["losses"] == read_json(whole / "train.json")["losses"]
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
