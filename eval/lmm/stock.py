"""`lift-eval stock`: whether lmms-eval's own `llava_hf` (one row at a time, float32) gives a run's answers, row by row."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.lmm.command import run_identity
from eval.lmm.data import chosen_tasks, data_hash, link_data
from eval.lmm.plugin import clean_answer
from eval.lmm.run import read_samples, run_lmms_eval
from eval.lmm.run_folder import read_run, read_task_records
from eval.lmm.tasks import LmmTask
from eval.output import format_table
from eval.records import Record
from eval.settings import StockSettings
from lift.common.checks import given
from lift.common.errors import UserError
from lmm.inference import check_is_llava, torch_device

UNTIL = "ASSISTANT:"
"""The stop string of lmms-eval's tasks, which stock `llava_hf` ignores: what follows it is no part of the answer."""
_RESIZING = (
    "Stock resizes images with torchvision, this run with PIL as in training: up to one grey level apart, on which a close "
    "answer may turn. Images that need no resizing are the same for both."
)


def stock(settings: StockSettings) -> None:
    """Command `lift-eval stock`. Raises UserError when a row's answer differs."""
    against = given(settings.against, "against")
    check_is_llava(settings.folder)
    run = read_run(against)
    records = _answerable(settings, against, run)
    tasks = chosen_tasks(",".join(records), settings.data)
    _check_same(settings, against, run, tasks)
    by_length: dict[int, list[LmmTask]] = defaultdict(list)
    for task in tasks:
        by_length[run["tasks"][task.name]["max_new_tokens"]].append(task)
    log = against.with_name(f"{against.name}.stock.log")
    rows = []
    for max_new_tokens, its_tasks in by_length.items():
        rows += _compare(settings, against, its_tasks, max_new_tokens, records, log)
    log.unlink()
    different = [row for row in rows if row[2] != row[3]]
    print(f"stock llava_hf: {len(rows) - len(different)} rows equal, {len(different)} different")
    if different:
        shown = [(task, key, repr(ours), repr(theirs)) for task, key, ours, theirs in different[:10]]
        table = format_table(["task", "row", "this run", "stock"], shown)
        raise UserError(f"{against}: {len(different)} of {len(rows)} answers differ from stock llava_hf:\n{table}\n{_RESIZING}")


def _answerable(settings: StockSettings, against: Path, run: dict[str, Any]) -> dict[str, list[Record]]:
    """Records by task, of the tasks chosen that stock can answer."""
    names = list(run["tasks"]) if settings.tasks is None else [name.strip() for name in settings.tasks.split(",")]
    if missing := [name for name in names if name not in run["tasks"]]:
        raise UserError(f"{against}: holds no task '{missing[0]}'. It holds {', '.join(run['tasks'])}.")
    records = {name: read_task_records(against, name) for name in names}
    for name in names:
        if without := [record.key for record in records[name] if not record.images]:
            print(
                f"{name}: left out; {len(without)} rows (first {without[0]}) have no image, and stock llava_hf answers such "
                "a row with the image of the row before it."
            )
            del records[name]
    if not records:
        raise UserError(f"{against}: stock llava_hf can answer none of its tasks.")
    return records


def _check_same(settings: StockSettings, against: Path, run: dict[str, Any], tasks: Sequence[LmmTask]) -> None:
    if run["gen"]["dtype"] != "float32":
        raise UserError(f"{against}: expected a run in float32, found {run['gen']['dtype']}. Make it with --dtype float32.")
    now = run_identity(settings.folder, settings.device, "float32")
    pairs = [(key, now[key], run[key]) for key in ("model_hash", "versions")]
    pairs += [(f"data_hash of {t.name}", data_hash(settings.data, t), run["tasks"][t.name]["data_hash"]) for t in tasks]
    for key, value, found in pairs:
        if value != found:
            whose = f"{settings.folder} has {value}" if key == "model_hash" else f"here it is {value}"
            raise UserError(
                f"{against}: is a run with another {key}: {found}, but {whose}. Give the folder and data of that run, or make "
                "it again with lift-eval lmm."
            )


def _compare(
    settings: StockSettings,
    against: Path,
    tasks: Sequence[LmmTask],
    max_new_tokens: int,
    records: dict[str, list[Record]],
    log: Path,
) -> list[tuple[str, str, str, str]]:
    """(task, key, this run's answer, stock's answer) of every row, both as lmms-eval's filter leaves them."""
    with tempfile.TemporaryDirectory() as folder:
        work, outputs = Path(folder), Path(folder) / "outputs"
        data = link_data(settings.data, tasks, work)
        run_lmms_eval(
            [task.lmms_task for task in tasks],
            settings.folder,
            work,
            outputs,
            log,
            model_name="llava_hf",
            dtype="float32",
            device=str(torch_device(settings.device)),
            batch_size=1,
            from_hub=data is None,
            max_new_tokens=max_new_tokens,
            answers_only=True,  # its scoring fails on answers with control characters
        )
        rows = []
        for task in tasks:
            ours = read_samples(against / task.name / "lmms_eval", task.lmms_task, log)
            theirs = read_samples(outputs, task.lmms_task, log)
            if ours.keys() != theirs.keys():
                raise UserError(
                    f"{against}: stock answered {len(theirs)} rows of {task.name}, this run {len(ours)}. See {log}."
                )
            for doc_id, record in enumerate(records[task.name]):
                rows.append((task.name, record.key, clean_answer(ours[doc_id], UNTIL), clean_answer(theirs[doc_id], UNTIL)))
    return rows
