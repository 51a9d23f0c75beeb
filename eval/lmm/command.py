"""MMBench runs of a LLaVA folder by lmms-eval (`lift-eval lmm`), and their check against stock `llava_hf` (`lift-eval stock`).

A run folder holds `records.jsonl` (one line per question row), `run.json` and lmms-eval's own outputs; it exists only complete.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.lmm.plugin import clean_answer
from eval.lmm.run import run_lmms_eval
from eval.mmbench import record, score_records
from eval.mmbench_data import TASK, read_questions
from eval.output import format_table, percent
from eval.score import score_table
from eval.settings import LmmSettings, StockSettings, given
from lift.common.errors import UserError
from lift.common.files import (
    atomic_folder,
    check_output_folder,
    read_json,
    read_jsonl,
    require_file,
    require_folder,
    sha256_file,
    sha256_folder,
    write_json,
    write_jsonl,
)

UNTIL = "ASSISTANT:"
"""The task's stop string, which stock `llava_hf` ignores."""

_PACKAGES = ("lmms-eval", "transformers", "torch")


def lmm(settings: LmmSettings) -> None:
    """Command `lift-eval lmm`. Reuses a finished run of the same model, data, settings and package versions."""
    data, out = given(settings.data, "data"), given(settings.out, "out")
    check_output_folder(out, "run.json")
    run = _identity(settings.folder, data) | {"gen": _generation(settings)}
    if _is_finished(out, run):
        print(f"{out}: reused, a finished run of the same model, data and settings.")
    else:
        _run(settings, data, out, run)
        print(f"{out}: finished.")
    finished = read_json(out / "run.json", "a run")
    print(score_table(finished["scores"]))
    print(f"lmms-eval's own static score: {percent(finished['lmms_eval_static']['overall_acc'])} (looser letter rule)")


def stock(settings: StockSettings) -> None:
    """Command `lift-eval stock`: stock `llava_hf`, batch size 1, float32. Raises UserError when a row's answer differs."""
    data, against = given(settings.data, "data"), given(settings.against, "against")
    run = read_json(against / "run.json", "a run folder of lift-eval lmm")
    for key, value in _identity(settings.folder, data).items():
        if run[key] != value and key.endswith(("hash", "versions")):
            raise UserError(
                f"{against}: expected a run with {key} {value}, found {run[key]}. Make it again with lift-eval lmm."
            )
    if run["gen"]["dtype"] != "float32":
        raise UserError(f"{against}: expected a run in float32, found {run['gen']['dtype']}. Make it with --dtype float32.")
    rows, records = read_questions(data), read_jsonl(against / "records.jsonl", "the run's answers")
    log = against.with_name(f"{against.name}.stock.log")
    with tempfile.TemporaryDirectory() as work:
        result = run_lmms_eval(
            rows,
            settings.folder,
            Path(work),
            log,
            model_name="llava_hf",
            dtype="float32",
            device=_device(settings.device),
            batch_size=1,
            max_new_tokens=run["gen"]["max_new_tokens"],
            answers_only=True,
        )
    log.unlink()
    # Stock ignores the task's stop string; what follows it is no part of the answer.
    ours = {row["index"]: row["response"] for row in records}
    pairs = [
        (row["index"], ours[row["index"]], clean_answer(theirs, UNTIL))
        for row, theirs in zip(rows, result.responses, strict=True)
    ]
    different = [pair for pair in pairs if pair[1] != pair[2]]
    print(f"stock llava_hf: {len(pairs) - len(different)} rows equal, {len(different)} different")
    if different:
        table = format_table(["index", "this run", "stock"], [(index, repr(a), repr(b)) for index, a, b in different[:10]])
        raise UserError(f"{against}: {len(different)} of {len(pairs)} answers differ from stock llava_hf:\n{table}")


def _run(settings: LmmSettings, data: Path, out: Path, run: dict[str, Any]) -> None:
    rows = read_questions(data)
    log = out.with_name(f"{out.name}.log")
    start = time.monotonic()
    with atomic_folder(out) as work:
        result = run_lmms_eval(
            rows,
            settings.folder,
            work,
            log,
            dtype=run["gen"]["dtype"],
            device=run["gen"]["device"],
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )
        records = [record(row, response, TASK) for row, response in zip(rows, result.responses, strict=True)]
        write_jsonl(work / "records.jsonl", records)
        run |= {"seconds": round(time.monotonic() - start, 1), "command": result.command, "rows": len(records)}
        run |= {"scores": score_records(records), "lmms_eval_static": result.static_score}
        log.replace(work / "lmms_eval" / "log.txt")
        write_json(work / "run.json", run)


def _identity(folder: Path, data: Path) -> dict[str, Any]:
    require_folder(folder, "a LLaVA folder")
    require_file(folder / "config.json", "the configuration of a LLaVA folder")
    model_type = read_json(folder / "config.json", "the configuration of a LLaVA folder").get("model_type")
    if model_type != "llava":
        raise UserError(
            f"{folder}/config.json: expected model_type 'llava', found '{model_type}'. Give the folder that lmm train wrote."
        )
    return {
        "model": str(folder.resolve()),
        "model_hash": sha256_folder(folder),
        "data": str(data.resolve()),
        "data_hash": sha256_file(require_file(data, "an MMBench TSV")),
        "task": TASK,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _generation(settings: LmmSettings) -> dict[str, Any]:
    device = _device(settings.device)
    dtype = "float32" if settings.dtype == "auto" and device == "cpu" else settings.dtype
    return {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "dtype": dtype,
        "device": device,
        "greedy": True,
    }


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device that torch can use. Give --device cpu.")
    return name


def _is_finished(out: Path, run: dict[str, Any]) -> bool:
    if not (out / "run.json").is_file():
        return False
    earlier = read_json(out / "run.json", "a run")
    return all(earlier.get(key) == run[key] for key in ("model_hash", "data_hash", "task", "gen", "versions"))
