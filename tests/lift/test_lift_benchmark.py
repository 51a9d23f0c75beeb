"""`benchmarks/pretrain.py`: a cell trains on batches that are what its row claims, and the table compares like with like."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from lift.settings import ClipTextSettings, VisionSettings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH = 4


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("pretrain")
    vision = VisionSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    clip_text = ClipTextSettings(width=16, layers=1, heads=2, embedding_dim=16, vocabulary_size=300)
    monkeypatch.setitem(module.SCALES, "tiny", module.Scale(vision, clip_text, 8, "fp32", BATCH, 2))
    return module


@pytest.mark.parametrize("changes", [{}, {"objective": "clip", "tokens": 40}], ids=["lift", "clip"])
def test_a_cell(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: Path, changes: dict) -> None:
    bench.make_inputs(tmp_path, bench.SCALES["tiny"], pairs, BATCH)
    seen = []
    step = bench.Training.step
    monkeypatch.setattr(bench.Training, "step", lambda self, number, batch: (seen.append(batch), step(self, number, batch))[1])
    options = argparse.Namespace(scale="tiny", data=pairs, batch_size=BATCH, micro_batch_size=None, precision="fp32", workers=0)
    options.gradient_checkpointing = options.compile = False
    found = bench.measure(bench.cell_settings(options, tmp_path, changes), steps=2)
    assert len(seen) == (2 + 2) + (1 + 2)  # in memory, then loaded; each after its warm-up
    assert len({tuple(batch.keys) for batch in seen[:4]}) == 1 and len({tuple(batch.keys) for batch in seen[4:]}) == 3
    for batch in seen:
        if changes:
            assert batch.text["attention_mask"].tolist() == [[1] * 40] * BATCH
        else:
            assert batch.text["embeddings"].shape == (BATCH, 8)
    assert found["mfu"] == pytest.approx(found["samples_per_second"] * found["flops_per_sample"] / found["matrix_peak_flops"])
    assert 0 < found["data_wait_share"] < 1


def test_ratios_are_taken_within_a_round_and_a_failure_spoils_its_row_alone(bench: ModuleType) -> None:
    def result(rate: float, peak: int) -> dict:
        return {"samples_per_second": rate, "peak_bytes": peak, "mfu": None}

    rounds = [
        {"LIFT": result(10, 100), "CLIP": result(5, 150), "broken": {"failed": "out of memory"}},
        {"LIFT": result(4, 90), "CLIP": result(2, 200), "broken": result(9, 9)},  # a busier machine, twice as slow
    ]
    summary = bench.summarise(rounds)
    assert summary["LIFT"]["time_ratio"] == summary["LIFT"]["memory_ratio"] == 1
    assert summary["CLIP"] == {"samples_per_second": 3.5, "mfu": None, "peak_bytes": 200, "time_ratio": 2, "memory_ratio": 2}
    assert summary["broken"] == {"failed": "out of memory"}
    assert bench.table(summary).splitlines()[-1] == "broken: out of memory"
