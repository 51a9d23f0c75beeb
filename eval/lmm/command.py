"""`lift-eval lmm`: lmms-eval's own tasks on a LLaVA folder; a run folder (see `run_folder`) comes out.

Tasks that lmms-eval can score without a judge go through one process; through another the rest, of which it only collects the
answers. Finished tasks are reused, interrupted ones go on, and another call may add tasks to a run.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers.score import scores_of, scores_table
from eval.lmm.data import chosen_tasks, data_hash, data_rows, link_data
from eval.lmm.likelihood import why_not
from eval.lmm.run import run_lmms_eval
from eval.lmm.run_folder import (
    RUN_FILE,
    SCRATCH,
    check_run_folder,
    drop_unfinished,
    earlier_tasks,
    finish_task,
    open_unfinished,
    read_run,
    read_task_records,
)
from eval.lmm.tasks import LmmTask, task_source
from eval.settings import LmmSettings
from lift.common.checks import given
from lift.common.files import LOCK_FILE, locked_folder, sha256_folder, write_json
from lmm.inference import check_is_llava, number_format, torch_device

PACKAGES = ("lmms-eval", "transformers", "torch")


def lmm(settings: LmmSettings) -> None:
    """Command `lift-eval lmm`."""
    out = given(settings.out, "out")
    check_is_llava(settings.folder)
    tasks = chosen_tasks(settings.tasks, settings.data)
    check_run_folder(out)
    run = run_identity(settings.folder, settings.device, settings.dtype)
    likelihood = settings.likelihood
    if likelihood is None:
        reason = why_not(settings.folder)
        likelihood = not reason
        if reason:
            print(f"{settings.folder}: no likelihood scoring, {reason}.")
    wanted = {task.name: _task_identity(task, settings, likelihood) for task in tasks}
    with locked_folder(out):
        shutil.rmtree(out / SCRATCH, ignore_errors=True)
        finished = earlier_tasks(out, run, wanted)
        seconds = read_run(out)["seconds"] if finished else 0.0
        run |= {"command": _command(settings, tasks), "seconds": seconds, "tasks": finished}
        for task in tasks:
            if task.name in finished:
                print(f"{out / task.name}: reused, a finished run of the same model, data and settings.")
        to_run = [task for task in tasks if task.name not in finished]
        try:
            for scored in (True, False):
                if its_tasks := [task for task in to_run if task.scored_by_lmms == scored]:
                    _run_process(settings, its_tasks, run, wanted)
        finally:
            shutil.rmtree(out / SCRATCH, ignore_errors=True)
            if not any(path for path in out.iterdir() if path.name != LOCK_FILE):
                shutil.rmtree(out)  # nothing came of it: the data were faulty
    for task in tasks:
        print(f"\n{scores_table(scores_of(task.name, read_task_records(out, task.name)))}")
        if theirs := run["tasks"][task.name]["lmms_eval"]:
            print("lmms-eval's own numbers:", ", ".join(f"{name} {value}" for name, value in theirs.items() if "/" not in name))


def run_identity(folder: Path, device: str, dtype: str) -> dict[str, Any]:
    """What a run's tasks have in common. Raises UserError for a device that this machine lacks."""
    on = torch_device(device)
    return {
        "model": str(folder.resolve()),
        "model_hash": sha256_folder(folder),
        # a run may move to another GPU of the machine, but what a GPU answers is not what a CPU answers
        "gen": {"greedy": True, "dtype": number_format(dtype, on), "device": on.type},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _task_identity(task: LmmTask, settings: LmmSettings, likelihood: bool) -> dict[str, Any]:
    # Batch size is no part of it: after running out of memory, a run goes on in smaller batches.
    data = f"hub: {task_source(task.lmms_task).repository}" if settings.data is None else str(settings.data.resolve())
    return {
        "lmms_task": task.lmms_task,
        "data": data,
        "data_hash": data_hash(settings.data, task),
        "max_new_tokens": settings.max_new_tokens or task.max_new_tokens,
        "likelihood": likelihood,
    }


def _run_process(
    settings: LmmSettings, tasks: Sequence[LmmTask], run: dict[str, Any], wanted: dict[str, dict[str, Any]]
) -> None:
    """Answers `tasks` in one lmms-eval process and finishes each; `run` and `run.json` then name them."""
    out, start = given(settings.out, "out"), time.monotonic()
    work, outputs, log = out / SCRATCH, out / SCRATCH / "outputs", out / "lmms_eval.log"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    data = link_data(settings.data, tasks, work)
    job = {}
    for task in tasks:
        identity = {key: run[key] for key in ("model_hash", "gen", "versions")} | wanted[task.name]
        del identity["data"]  # where it is does not matter
        folder = open_unfinished(out, task.name, identity)
        entry = {"name": task.name, "folder": str(folder.resolve()), "likelihood": wanted[task.name]["likelihood"]}
        job[task.lmms_task] = entry | {"max_new_tokens": wanted[task.name]["max_new_tokens"]}
    write_json(work / "job.json", job)
    print(
        f"{out}: lmms-eval loads the model for {', '.join(task.name for task in tasks)}; its output goes to {log}.", flush=True
    )
    command = run_lmms_eval(
        list(job),
        settings.folder,
        work,
        outputs,
        log,
        dtype=run["gen"]["dtype"],
        device=str(torch_device(settings.device)),
        batch_size=settings.batch_size,
        from_hub=data is None,
        model_args={"job": "job.json"},
        answers_only=not tasks[0].scored_by_lmms,
    )
    # What is replaced goes first, all of it: no task of an earlier run may stand beside those of this one.
    if (out / RUN_FILE).is_file():
        write_json(out / RUN_FILE, run)
    for name in wanted.keys() - run["tasks"].keys():
        shutil.rmtree(out / name, ignore_errors=True)
    for task in tasks:
        rows = None if data is None else data_rows(data, task)
        entry, _ = finish_task(out, task, outputs, log, rows)
        run["tasks"][task.name] = wanted[task.name] | {"batch_size": settings.batch_size, "command": command} | entry
    run["seconds"] = round(run["seconds"] + time.monotonic() - start, 1)
    write_json(out / RUN_FILE, run)
    log.unlink()
    for task in tasks:
        drop_unfinished(out, task.name)
        print(f"{out / task.name}: finished, {run['tasks'][task.name]['rows']} rows.")


def _command(settings: LmmSettings, tasks: Sequence[LmmTask]) -> str:
    parts = ["lift-eval", "lmm", str(settings.folder), "--tasks", ",".join(task.name for task in tasks)]
    parts += [] if settings.data is None else ["--data", str(settings.data)]
    parts += ["--out", str(settings.out), "--dtype", settings.dtype, "--device", settings.device]
    parts += ["--batch_size", str(settings.batch_size)]
    parts += [] if settings.likelihood is None else ["--likelihood", str(settings.likelihood).lower()]
    parts += [] if settings.max_new_tokens is None else ["--max_new_tokens", str(settings.max_new_tokens)]
    return shlex.join(parts)
