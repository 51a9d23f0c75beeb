"""`lift-eval score`: answers to MMBench questions come in (ours or a published answer file), a table of accuracies goes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.mmbench import record, score_records
from eval.mmbench_data import question_fields, read_table
from eval.output import format_table, percent
from eval.settings import ScoreSettings
from lift.common.errors import UserError
from lift.common.files import read_jsonl

_RECORD_KEYS = ("group", "rotation", "category", "l2_category", "prediction", "correct")


def score(settings: ScoreSettings) -> None:
    """Command `lift-eval score`."""
    scores = score_records(read_answers(settings.file))
    print(json.dumps(scores, indent=2, ensure_ascii=False) if settings.json else score_table(scores))


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Records (see `mmbench.record`) from `records.jsonl`, or from a .tsv or .xlsx with a `prediction` column.

    Raises:
        UserError: unreadable, another form, no rows.
    """
    if path.suffix in (".tsv", ".xlsx"):
        table = read_table(path, ("index", "question", "A", "B", "answer", "prediction"))
        rows = (row | {"image_sha256": None} for row in question_fields(table, path))
        return [record(row, prediction, path.stem) for row, prediction in zip(rows, table["prediction"], strict=True)]
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: expected records.jsonl, or a .tsv or .xlsx answer file, found '{path.suffix}'.")
    records = read_jsonl(path, "records of a run")
    if not records:
        raise UserError(f"{path}: expected answers, found none.")
    for number, row in enumerate(records, start=1):
        if missing := [key for key in _RECORD_KEYS if key not in row]:
            raise UserError(
                f"{path}:{number}: expected the key '{missing[0]}'. Give the records.jsonl that lift-eval lmm wrote."
            )
    return records


def score_table(scores: dict[str, Any]) -> str:
    """The result of `mmbench.score_records` as text, accuracies in percent."""
    named = [("overall", scores["overall"])]
    named += [(f"{level.upper()} {name}", values) for level in ("l1", "l2", "l3") for name, values in scores[level].items()]
    rows = [
        (name, v["groups"], v["rows"], percent(v["circular"]), percent(v["vanilla"]), percent(v["parse_failure_rate"]))
        for name, v in named
    ]
    return format_table(["MMBench", "groups", "rows", "circular %", "first pass %", "unparsed %"], rows)
