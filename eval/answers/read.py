"""Answer files of whatever origin become records: a file or run folder comes in, `Answers` with what had to be said go out.

The form is told from the content, never from a name: the first bytes (a zip archive is .xlsx), then the columns or keys.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.records import RECORDS_FILE, Record, read_records
from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl, require_file

FORMATS = ("auto", "records", "table", "llava_mmbench", "llava", "lmms_eval")
CIRCULAR_TASKS = ("mmbench", "mmbench_cn")


@dataclass(frozen=True)
class Answers:
    records: list[Record]
    form: str
    """One of FORMATS."""
    notes: list[str] = field(default_factory=list)
    """What was joined, left out or not known."""


@dataclass(frozen=True)
class Request:
    """What is read, and what helps to understand it."""

    path: Path
    task: str | None = None
    questions: Path | None = None

    def need(self, what: str, why: str) -> UserError:
        return UserError(f"{self.path}: {why} Give --{what}.")


def read_answers(path: Path, form: str = "auto", task: str | None = None, questions: Path | None = None) -> Answers:
    """Records of an answer file or of a run folder.

    Args:
        form: one of FORMATS; `auto` looks into the file.
        task: name of the benchmark where the file does not say it; of a run folder, the one to read.
        questions: the benchmark's questions (MMBench TSV, published layout, or a folder of `lift-eval data`), from which
            categories, options and answers are taken that the file lacks.
    Raises:
        UserError: unreadable, of no known form or of several, no rows, a row twice, a rotation without its first pass.
    """
    if path.is_dir():
        return _run_folder(path, task)
    require_file(path, "an answer file or a run folder")
    rows = None if _is_table(path) else _json_rows(path)
    found = _recognise(path, rows) if form == "auto" else form
    if (found == "table") != (rows is None):
        raise UserError(f"{path}: expected {found} answers, found {'a table' if rows is None else 'JSON'}. Check --format.")
    for number, row in enumerate(rows or [], start=1):
        if missing := sorted(_KEYS[found] - row.keys()):
            raise UserError(f"{path}: row {number}: expected '{missing[0]}' as in every row of the form {found}, found none.")
    answers = _READERS[found](Request(path, task, questions), rows or [])
    if not answers.records:
        raise UserError(f"{path}: expected answers, found none.")
    _check_keys(path, answers.records)
    return Answers(answers.records, found, answers.notes + _check_rotations(path, answers.records))


def _run_folder(path: Path, task: str | None) -> Answers:
    files = sorted(path.glob(f"*/{RECORDS_FILE}"))
    if (path / "run.json").is_file():  # the order in which the tasks were run
        listed = read_json(path / "run.json", "the summary of a run").get("tasks", {})
        files = [path / name / RECORDS_FILE for name in listed]
    if task is not None:
        files = [file for file in files if file.parent.name == task]
    if not files:
        raise _no_records(path, task)
    records = [record for file in files for record in _checked_records(file)]
    return Answers(records, "records", _check_rotations(path, records))


def _no_records(path: Path, task: str | None) -> UserError:
    wanted = f"{task}/{RECORDS_FILE}" if task else f"TASK/{RECORDS_FILE}"
    there = sorted(file.parent.name for file in path.glob(f"*/{RECORDS_FILE}"))
    begun = sorted(folder.name for folder in path.glob("*.unfinished"))
    advice = "Check the path."
    if there:
        advice = f"It has {', '.join(there)}. Check --task."
    elif (path / RECORDS_FILE).is_file():
        advice = f"Give the run folder {path.parent} with --task {path.name}, or {path / RECORDS_FILE}."
    if begun and (task is None or f"{task}.unfinished" in begun):
        advice = f"The run was interrupted ({', '.join(begun)}): finish it with the same lift-eval lmm command."
    return UserError(f"{path}: expected a run folder of lift-eval lmm with {wanted}, found none. {advice}")


def _checked_records(file: Path) -> list[Record]:
    """Raises UserError, with the row, for fields that nothing can be counted from."""
    records = read_records(file)
    for record in records:
        score = record.score
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise UserError(f"{file}: {record.task} {record.key}: expected a score of 0 to 1, found {score!r}. Run it again.")
        if not isinstance(record.rotation, int) or not isinstance(record.categories, dict) or not record.answer:
            raise UserError(
                f"{file}: {record.task} {record.key}: expected a number as rotation, named categories and an answer, found "
                f"{record.rotation!r}, {record.categories!r}, {record.answer!r}. Run it again."
            )
    return records


def _is_table(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise UserError(f"{path}: expected answers, found an empty file.")
    return start[:1] not in (b"{", b"[")


def _json_rows(path: Path) -> list[Any]:
    """Of JSON lines, or of one JSON list."""
    with path.open("rb") as file:
        first = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    rows = read_json(path, "answers") if first == b"[" else read_jsonl(path, "answers")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number}: expected an object, found {json.dumps(row)[:40]}.")
    if not rows:
        raise UserError(f"{path}: expected answers, found none.")
    return rows


_KEYS = {
    "records": {"task", "key", "group", "rotation", "response", "prediction", "score"},
    "llava_mmbench": {"question_id", "round_id", "text", "options", "option_char"},
    "llava": {"question_id", "text"},
    "lmms_eval": {"doc_id", "target"},
}
"""Keys of each JSON form's rows."""


def _recognise(path: Path, rows: list[Any] | None) -> str:
    if rows is None:
        return "table"
    keys = set(rows[0])
    fitting = [form for form, needed in _KEYS.items() if needed <= keys]
    if "llava_mmbench" in fitting:
        fitting.remove("llava")
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{form} ({', '.join(sorted(needed))})" for form, needed in _KEYS.items())
    if not fitting:
        raise UserError(f"{path}: the keys {', '.join(sorted(keys))} are those of no known answer file: {known}.")
    raise UserError(f"{path}: may be {' or '.join(fitting)}: it has the keys of both. Give --format with one of them.")


def _records_file(request: Request, rows: list[Any]) -> Answers:
    records = _checked_records(request.path)
    if request.task is not None:
        records = [record for record in records if record.task == request.task]
    return Answers(records, "records")


def _table(request: Request, rows: list[Any]) -> Answers:
    from eval.answers.tables import read_answer_table

    return Answers(*read_answer_table(request))


def _llava_mmbench(request: Request, rows: list[Any]) -> Answers:
    from eval.answers.llava import read_rounds

    return Answers(*read_rounds(request, rows))


def _llava(request: Request, rows: list[Any]) -> Answers:
    from eval.answers.llava import read_texts

    return Answers(*read_texts(request, rows))


def _lmms_eval(request: Request, rows: list[Any]) -> Answers:
    from eval.answers.lmms_samples import read_samples

    return Answers(*read_samples(request, rows))


_READERS: dict[str, Callable[[Request, list[Any]], Answers]] = {
    "records": _records_file,
    "table": _table,
    "llava_mmbench": _llava_mmbench,
    "llava": _llava,
    "lmms_eval": _lmms_eval,
}


def _check_keys(path: Path, records: Sequence[Record]) -> None:
    seen: set[tuple[str, str]] = set()
    for record in records:
        if (record.task, record.key) in seen:
            raise UserError(f"{path}: {record.task} {record.key} occurs twice. Give every row its own index.")
        seen.add((record.task, record.key))


def _check_rotations(path: Path, records: Sequence[Record]) -> list[str]:
    """Raises UserError for a rotation without its first pass; says which groups have fewer passes than options."""
    passes: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for record in records:
        if record.task in CIRCULAR_TASKS or record.rotation:
            passes[record.task, record.group][record.rotation] = record
    short: dict[str, list[str]] = defaultdict(list)
    for (task, group), of_group in passes.items():
        if 0 not in of_group:
            other = next(iter(of_group.values()))
            raise UserError(
                f"{path}: {task} {other.key} is a rotation of {group}, which has no answer. Give the answers to all passes."
            )
        if len(of_group) < len(of_group[0].options):
            short[task].append(group)
    return [_short_note(task, [of for (name, _), of in passes.items() if name == task], short[task]) for task in short]


def _short_note(task: str, groups: Sequence[dict[int, Record]], short: Sequence[str]) -> str:
    if len(short) == len(groups) and all(len(passes) == 1 for passes in groups):
        return f"{task}: only first passes: circular accuracy is that of one pass, the same as vanilla."
    return (
        f"{task}: {len(short)} of {len(groups)} groups have fewer passes than options, first {short[0]}: circular accuracy is "
        "over the passes there are."
    )
