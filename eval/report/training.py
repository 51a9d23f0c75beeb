"""What training cost and how its loss went: run folders of `lift pretrain` and `lmm train` come in, curves and sums go out.

A folder of `lmm finetune` stands for the stages in it. Only what the runs recorded is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lift.common.errors import UserError
from lift.common.files import read_json, read_whole_rows, require_folder

METRICS = "metrics.jsonl"
CURVE_POINTS = 400
"""A longer curve is shown by the means of this many equal stretches."""
CONFIG_SHOWN = 20_000
"""Characters of a config.yaml that the page shows."""


def read_training(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A record of every run in the order given: `name`, `stage`, `steps`, `samples`, `seconds`, `curve`, `config`, ...

    Raises:
        UserError: a folder holds no metrics of training.
    """
    return [_read_run(run) for folder in folders for run in _stages_of(folder)]


def _stages_of(folder: Path) -> list[Path]:
    require_folder(folder, "a run folder of lift pretrain or lmm train")
    if (folder / METRICS).is_file():
        return [folder]
    stages = [folder / name for name in ("stage1", "stage2") if (folder / name / METRICS).is_file()]
    if not stages:
        raise UserError(f"{folder}: expected a run of lift pretrain or lmm train, found no {METRICS}. Check the path.")
    return stages


def _read_run(run: Path) -> dict[str, Any]:
    rows = [row for row in read_whole_rows(run / METRICS) if isinstance(row, dict) and "step" in row]
    config = run / "config.yaml"
    record = {
        "folder": str(run),
        "curve": _curve(rows, "loss"),
        "validation": _curve(rows, "validation_loss"),
        "config": config.read_text(encoding="utf-8", errors="replace")[:CONFIG_SHOWN] if config.is_file() else None,
    }
    if (run / "train.json").is_file():
        return record | _llava_stage(run, rows)
    return record | _pretraining(run, rows)


def _pretraining(run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary = read_json(run / "finished.json") if (run / "finished.json").is_file() else {}
    mfu = [row["mfu"] for row in rows if "mfu" in row]
    return {
        "stage": "pretraining",
        "finished": bool(summary),
        "steps": summary.get("steps", rows[-1]["step"] if rows else 0),
        "samples": summary.get("samples"),
        "seconds": summary.get("seconds"),
        "flops": None,
        "mfu": float(np.mean(mfu)) if mfu else None,
        "hardware": _hardware(read_json(run / "environment.json") if (run / "environment.json").is_file() else {}),
    }


def _llava_stage(run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary = read_json(run / "train.json", "the record of lmm train")
    settings = summary.get("settings", {})
    batch = settings.get("batch_size", 0) * settings.get("gradient_accumulation", 1) * summary.get("processes", 1)
    flops = [row["total_flos"] for row in rows if row.get("total_flos")]
    trains = settings.get("trainable")
    return {
        "stage": "LLaVA stage 1" if trains == "projector" else "LLaVA stage 2" if trains else "LLaVA",
        "finished": True,
        "steps": summary.get("steps"),
        "samples": summary["steps"] * batch if batch and "steps" in summary else summary.get("samples"),
        "seconds": summary.get("seconds"),
        "flops": flops[-1] if flops else None,
        "mfu": None,
        "hardware": _hardware(summary.get("environment", {})),
    }


def _hardware(environment: dict[str, Any]) -> str | None:
    devices = environment.get("cuda_devices")
    if devices:
        return ", ".join(map(str, devices))
    return f"{environment['cpu_count']} CPU cores" if environment.get("cpu_count") else None


def _curve(rows: list[dict[str, Any]], key: str) -> dict[str, list[float]]:
    points = [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
    if len(points) > CURVE_POINTS:
        stretches = np.array_split(np.array(points), CURVE_POINTS)
        points = [tuple(map(float, stretch.mean(axis=0))) for stretch in stretches]  # type: ignore[misc]
    return {"step": [step for step, _ in points], "loss": [loss for _, loss in points]}


def total_cost(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the runs of one side; None where a run did not record the figure."""

    def total(key: str) -> float | None:
        values = [run[key] for run in runs]
        return sum(values) if values and None not in values else None

    return {key: total(key) for key in ("seconds", "samples", "flops")}
