"""The run folder of `lift-eval lmm`: which tasks are finished, what an interrupted one may take over, how one is finished.

`RUN/NAME` exists only complete, and `RUN/run.json` names it only then. Until then `RUN/NAME.unfinished` holds the answers so
far, with the identity (checkpoint, data, settings, versions) that a later call must share to go on from them.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.lmm.answers import ROWS_FILE, Answer, read_answers, zip_thumbnails
from eval.lmm.likelihood import likelihood
from eval.lmm.run import read_samples
from eval.lmm.tasks import LmmTask
from eval.records import RECORDS_FILE, Record, read_records, write_records
from lift.common.errors import UserError
from lift.common.files import LOCK_FILE, atomic_folder, check_output_folder, read_json, sha256_text, write_json

RUN_FILE = "run.json"
UNFINISHED = ".unfinished"
SCRATCH = "scratch.partial"
THUMBNAILS_FILE = "thumbnails.zip"
_IDENTITY_FILE = "identity.json"
_OF_RUN = ("model_hash", "gen", "versions")
_OF_TASK = ("lmms_task", "data_hash", "max_new_tokens", "likelihood")


def check_run_folder(out: Path) -> None:
    """Raises UserError when `out` holds something other than a run, finished or not."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # a kill before the first answer, while the data are written, leaves these two
    only_begun = bool(names) and names <= {LOCK_FILE, SCRATCH}
    if not only_begun and not any(name.endswith(UNFINISHED) for name in names):
        check_output_folder(out, RUN_FILE)


def read_run(out: Path) -> dict[str, Any]:
    """`run.json`. Raises UserError when it is missing or not one of these runs."""
    run = read_json(out / RUN_FILE, "a run of lift-eval lmm")
    if not isinstance(run, dict) or not isinstance(run.get("tasks"), dict):
        raise UserError(f"{out / RUN_FILE}: expected a run of lift-eval lmm with its tasks. Make it again with lift-eval lmm.")
    return run


def read_task_records(out: Path, name: str) -> list[Record]:
    return read_records(out / name / RECORDS_FILE)


def earlier_tasks(out: Path, run: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Entries of `run.json` that stay: finished tasks of this model, these settings and versions, with these data.

    Args:
        run: what identifies the run; wanted: name -> what identifies each task that is asked for.
    Raises:
        UserError: the folder holds tasks of another run beside the ones wanted now; they would be lost.
    """
    if not (out / RUN_FILE).is_file():
        return {}
    earlier = read_run(out)
    if changed := [key for key in _OF_RUN if earlier.get(key) != run[key]]:
        if others := sorted(earlier["tasks"].keys() - wanted.keys()):
            raise UserError(
                f"{out}: holds {', '.join(others)} of a run with another {_spoken(changed[0])}; a folder holds one run. "
                "Choose another --out, or name these tasks too to run them anew."
            )
        print(f"{out}: started anew, the {_spoken(changed[0])} is another than that of the run there.")
        return {}
    stay = {}
    for name, entry in earlier["tasks"].items():
        changed = [key for key in _OF_TASK if name in wanted and entry.get(key) != wanted[name][key]]
        if changed:
            print(f"{out / name}: started anew, the {_spoken(changed[0])} is another than that of the run there.")
        elif (out / name / RECORDS_FILE).is_file():
            stay[name] = entry
    return stay


def open_unfinished(out: Path, name: str, identity: dict[str, Any]) -> Path:
    """`out/NAME.unfinished`, with the answers of an interrupted run where its identity is equal; else empty."""
    folder = out / f"{name}{UNFINISHED}"
    if folder.exists():
        file = folder / _IDENTITY_FILE
        before = read_json(file) if file.is_file() else {}
        if changed := [key for key in identity if before.get(key) != identity[key]]:
            print(f"{name}: started anew, the {_spoken(changed[0])} is another than that of the interrupted run.")
            shutil.rmtree(folder)
        elif answers := read_answers(folder):
            print(f"{name}: {len(answers)} answers taken over from the interrupted run.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _IDENTITY_FILE, identity)
    return folder


def finish_task(
    out: Path, task: LmmTask, outputs: Path, log: Path, data_rows: int | None
) -> tuple[dict[str, Any], list[Record]]:
    """Makes `out/NAME` of the answers and lmms-eval's `outputs`; returns what `run.json` says of it, and the records.

    Raises:
        UserError: a row has no answer, or lmms-eval's own files are not all there.
    """
    unfinished = out / f"{task.name}{UNFINISHED}"
    rows = read_json(unfinished / ROWS_FILE, "the number of rows") if (unfinished / ROWS_FILE).is_file() else None
    by_id = read_answers(unfinished)
    if rows is None or (missing := sorted(set(range(rows)) - by_id.keys())):
        first = "" if rows is None else f", first that of row {missing[0]} of {rows}"
        raise UserError(
            f"{task.name}: expected an answer to every row, {len(by_id)} are there{first}. lmms-eval's full output is in {log}."
        )
    if data_rows is not None and data_rows != rows:
        raise UserError(f"{task.name}: the data have {data_rows} rows, but lmms-eval read {rows}. See {log}.")
    if len(samples := read_samples(outputs, task.lmms_task, log)) != rows:
        raise UserError(f"{task.name}: lmms-eval kept {len(samples)} of {rows} answers. See {log}.")
    scores = read_lmms_scores(outputs, task, log) if task.scored_by_lmms else None
    answers = [by_id[doc_id] for doc_id in range(rows)]
    with atomic_folder(out / task.name) as work:
        write_records(work / RECORDS_FILE, told_apart([make_record(task, answer) for answer in answers]))
        records = read_records(work / RECORDS_FILE)  # refuses keys that occur twice
        zip_thumbnails(unfinished, (sha256 for answer in answers for sha256 in answer.images), work / THUMBNAILS_FILE)
        shutil.copytree(outputs, work / "lmms_eval", ignore=lambda _, names: _samples_of_others(names, task.lmms_task))
        shutil.copyfile(log, work / "lmms_eval" / "log.txt")
    seconds = sum(answer.seconds for answer in answers)
    entry = {
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_second": round(rows / max(seconds, 1e-6), 3),
        "seen_hash": sha256_text("\n".join(f"{answer.prompt_sha256} {' '.join(answer.images)}" for answer in answers)),
        "lmms_eval": scores,
    }
    return entry, records


def _samples_of_others(names: list[str], lmms_task: str) -> list[str]:
    return [name for name in names if "_samples_" in name and not name.endswith(f"_samples_{lmms_task}.jsonl")]


def drop_unfinished(out: Path, name: str) -> None:
    shutil.rmtree(out / f"{name}{UNFINISHED}", ignore_errors=True)


def told_apart(records: Sequence[Record]) -> list[Record]:
    """Rows that the hub's data hold several times have one key where it is a hash: the second becomes `KEY (2)`.

    Rows with the same key that differ in what was asked keep it, and are refused when the records are read.
    """
    times: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
    named = []
    for record in records:
        same = (record.key, record.text_hash, tuple(record.images))
        times[same] += 1
        named.append(record if times[same] == 1 else replace(record, key=f"{record.key} ({times[same]})"))
    return named


def make_record(task: LmmTask, answer: Answer) -> Record:
    record = task.record(answer.doc, answer.response, answer.images)
    if answer.log_probabilities is None:
        return record
    return replace(record, likelihood=likelihood(answer.log_probabilities, record.answer))


def read_lmms_scores(outputs: Path, task: LmmTask, log: Path) -> dict[str, float | None]:
    """lmms-eval's own numbers by metric; MMBench's, which come by its looser letter rule, also per L2 and L3 (fractions).

    Raises:
        UserError: lmms-eval ended without results.
    """
    files = [path for path in sorted(outputs.rglob("*_results.json")) if path.parent.name != "submissions"]
    results = read_json(files[-1], "lmms-eval's results").get("results", {}) if files else {}
    if task.lmms_task not in results:
        raise UserError(f"{outputs}: expected lmms-eval's results of {task.lmms_task}, found none. Its output is in {log}.")
    scores = {
        metric.removesuffix(",none"): _finite(value)
        for metric, value in results[task.lmms_task].items()
        if isinstance(value, (int, float)) and "_stderr" not in metric
    }
    static = outputs / "submissions" / f"{task.lmms_task}_results.json"
    if static.is_file():
        by_level = read_json(static, "lmms-eval's static score")
        scores = {"overall": _finite(by_level["overall_acc"])}  # the metric beside it only looks like a judge's
        for level, key in (("l2", "l2_category_acc"), ("l3", "category_acc")):
            scores |= {f"{level}/{name}": _finite(value) for name, value in by_level[key].items()}
    return scores


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spoken(key: str) -> str:
    names = {"gen": "generation", "model_hash": "checkpoint", "data_hash": "data", "versions": "package version"}
    return names.get(key, key)
