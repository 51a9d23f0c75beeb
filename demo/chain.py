"""`python -m demo run`: the whole chain on the demo world, from captions to the comparison of LIFT with CLIP.

Every stage is a command that users run on their own data; it is printed before it runs and decides itself what it reuses.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.settings import SIZES, RunSettings
from lift.common.errors import UserError
from lift.common.files import read_json, write_json

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "configs" / "demo"
ENCODERS = ("lift", "clip")


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    """Module and arguments: `python -m ...`."""
    result: Path
    """File that the finished stage has written; untouched when the stage was reused."""


def run(settings: RunSettings) -> None:
    """Runs the stages up to `settings.until` and records their times in OUT/stages.json.

    Raises:
        UserError: a stage failed; its own message stands above.
    """
    chain = stages(settings)
    names = [stage.name for stage in chain]
    if settings.until is not None:
        if settings.until not in names:
            raise UserError(f"--until: no stage '{settings.until}'. Stages are: {', '.join(names)}.")
        chain = chain[: names.index(settings.until) + 1]
    run_stages(chain, settings.folder)


def run_stages(chain: list[Stage], out: Path) -> None:
    """Runs each stage's command as a process of its own; OUT/stages.json holds the time of every stage that ever ran."""
    times = out / "stages.json"
    records = {record["stage"]: record for record in (read_json(times) if times.is_file() else [])}
    for number, stage in enumerate(chain, start=1):
        command = shlex.join(["python", "-m", *stage.command])
        print(f"\n[{number}/{len(chain)}] {stage.name}\n$ LIFT_DEMO={out} {command}", flush=True)
        records[stage.name] = _run_stage(stage, out, records.get(stage.name))
        write_json(times, list(records.values()))


def _run_stage(stage: Stage, out: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """The stage's record: seconds and peak memory of its largest process; what was reused keeps those of its first run."""
    written = _written(stage.result)
    start = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LIFT_DEMO": str(out)}
    process = subprocess.Popen([sys.executable, "-m", *stage.command], env=environment)
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = status = os.waitstatus_to_exitcode(code)
    if status:
        raise UserError(f"stage '{stage.name}' ended with status {status}; its message is above. Run the same command again.")
    if before is not None and written is not None and written == _written(stage.result):
        return before | {"reused": True}
    cost = {"seconds": round(time.monotonic() - start, 1), "peak_gb": round(usage.ru_maxrss / 2**20, 2)}
    return {"stage": stage.name, **cost, "reused": False}


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def stages(settings: RunSettings) -> list[Stage]:
    """The chain of DESIGN's picture, LIFT and CLIP alike. The recipes find the folder OUT in the variable LIFT_DEMO."""
    out, seed = settings.folder, ["--seed", str(settings.seed)]
    world = ["demo", "world", "--out", str(out / "world"), "--size", settings.size, *seed]
    llm = ["demo", "language_model", "--texts", str(out / "world" / "texts.jsonl"), "--out", str(out / "language_model"), *seed]
    return [
        Stage("world", world, out / "world" / "world.json"),
        Stage("embed captions", ["lift", "embed", *_recipe("embed")], out / "embeddings" / "manifest.json"),
        pretrain("lift", "lift", settings),
        Stage("language model", llm, out / "language_model" / "training.json"),
        pretrain("clip", "clip", settings),
        *(measure_encoder(name, out) for name in ENCODERS),
        *(_finetune(name, settings) for name in ENCODERS),
        *(_measure_lmm(name, out) for name in ENCODERS),
        *_compare(out),
    ]


def _recipe(name: str) -> list[str]:
    return ["--config", str(RECIPES / f"{name}.yaml")]


def pretrain(name: str, recipe: str, settings: RunSettings, *changes: str) -> Stage:
    """Trains OUT/`name` by a recipe with `changes` (`--key value`)."""
    command = ["lift", "pretrain", *_recipe(recipe), "--epochs", str(SIZES[settings.size].pretrain_epochs)]
    command += ["--seed", str(settings.seed), *changes]
    return Stage(f"pretrain {name.upper()}", command, settings.folder / name / "finished.json")


def measure_encoder(name: str, out: Path) -> Stage:
    results = out / f"encoder_{name}"
    command = ["eval", "encoder", str(out / name / "encoder"), "--out", str(results)]
    command += ["--config", str(RECIPES / "benchmarks.yaml")]
    return Stage(f"measure the {name.upper()} encoder", command, results / "results.json")


def _finetune(name: str, settings: RunSettings) -> Stage:
    llava, seed = settings.folder / f"llava_{name}", str(settings.seed)
    command = ["lmm", "finetune", *_recipe("llava"), "--out", str(llava)]
    command += ["--vision_tower", str(settings.folder / name / "encoder")]
    command += ["--stage2.epochs", str(SIZES[settings.size].stage2_epochs)]
    command += ["--seed", seed, "--stage1.seed", seed, "--stage2.seed", seed]
    return Stage(f"tune LLaVA on {name.upper()}", command, llava / "stage2" / "train.json")


def _measure_lmm(name: str, out: Path) -> Stage:
    results = out / f"mmbench_{name}"
    command = ["eval", "lmm", str(out / f"llava_{name}" / "stage2"), "--out", str(results)]
    command += ["--tasks", "mmbench", "--data", str(out / "world" / "mmbench.tsv"), "--batch_size", "32"]
    return Stage(f"MMBench of LLaVA on {name.upper()}", command, results / "mmbench" / "records.jsonl")


def _compare(out: Path) -> Iterator[Stage]:
    comparison, runs = out / "comparison", [str(out / "mmbench_lift"), str(out / "mmbench_clip")]
    command = ["eval", "compare", *runs, "--out", str(comparison)]
    yield Stage("compare", command, comparison / "comparison.json")
    command = ["eval", "report", *runs, "--out", str(out / "report.html"), "--stages", str(out / "stages.json")]
    command += ["--encoder_a", str(out / "encoder_lift"), "--encoder_b", str(out / "encoder_clip")]
    command += [f"--training_a={json.dumps(_trained('lift', out))}", f"--training_b={json.dumps(_trained('clip', out))}"]
    yield Stage("report", command, out / "report.html")


def _trained(name: str, out: Path) -> list[str]:
    return [str(out / name), str(out / f"llava_{name}")]
