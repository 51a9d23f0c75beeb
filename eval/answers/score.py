"""Command `lift-eval score`: an answer file or a run folder comes in, a table or one JSON object of scores goes out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from eval.answers.read import CIRCULAR_TASKS, read_answers
from eval.answers.rules import static_hits
from eval.comparison.join import by_task
from eval.comparison.lmms import levels_of
from eval.comparison.measures import Measure, measures_of
from eval.mmbench import official_order
from eval.output import format_table, percent
from eval.records import Record
from eval.settings import ScoreSettings


def score(settings: ScoreSettings) -> None:
    """Command `lift-eval score`."""
    answers = read_answers(settings.file, settings.format, settings.task, settings.questions)
    scores = {task: scores_of(task, records) for task, records in by_task(answers.records).items()}
    if settings.json:
        said = {"file": str(settings.file), "format": answers.form, "notes": answers.notes}
        print(
            json.dumps(
                said | (next(iter(scores.values())) if len(scores) == 1 else {"tasks": scores}), indent=2, ensure_ascii=False
            )
        )
        return
    print("\n\n".join(scores_table(each) for each in scores.values()))
    for note in answers.notes:
        print(note)


def scores_of(task: str, records: Sequence[Record]) -> dict[str, Any]:
    """`overall`, and per name under each level (MMBench: `l1`, `l2`, `l3`), values as fractions.

    Each holds `n` (units: circular groups of MMBench, else rows), `rows`, the benchmark's measures (`circular` and `vanilla`,
    or `accuracy` with others), `parse_failures` (rows in whose response the rule reads nothing) and `parse_failure_rate`;
    MMBench also `lmms_eval_static` (circular accuracy by lmms-eval's own rule; None when it is not installed).
    """
    measures = measures_of(task, records)
    hits = static_hits(records) if task in CIRCULAR_TASKS else None
    levels = levels_of(records) or (["l1", "l2", "l3"] if task in CIRCULAR_TASKS else [])
    scores: dict[str, Any] = {"task": task, "overall": _scores(task, measures, records, hits)}
    for level in levels:
        places: dict[str, list[int]] = {}
        for place, record in enumerate(records):
            if name := record.categories.get(level):
                places.setdefault(name, []).append(place)
        scores[level] = {
            name: _scores(
                task, measures, [records[place] for place in places[name]], hits and [hits[place] for place in places[name]]
            )
            for name in sorted(places, key=official_order)
        }
    return scores


def _scores(task: str, measures: Sequence[Measure], records: Sequence[Record], hits: list[bool] | None) -> dict[str, Any]:
    units = [measure.units(records) for measure in measures]
    values = {measure.name: _number(each.terms.value) for measure, each in zip(measures, units, strict=True)}
    failures = sum(record.prediction is None for record in records)
    scores = {"n": len(units[0].keys), "rows": len(records)} | values
    scores |= {"parse_failures": failures, "parse_failure_rate": failures / len(records)}
    if task in CIRCULAR_TASKS:
        scores["lmms_eval_static"] = None if hits is None else _share_of_groups(records, hits)
    return scores


def _share_of_groups(records: Sequence[Record], hits: Sequence[bool]) -> float:
    right: dict[str, bool] = {}
    for record, hit in zip(records, hits, strict=True):
        right[record.group] = right.get(record.group, True) and hit
    return sum(right.values()) / len(right)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scores_table(scores: dict[str, Any]) -> str:
    """The result of `scores_of` as text: fractions in percent, published scores as they are."""
    names = [name for name in scores["overall"] if name not in ("n", "rows", "parse_failures")]
    header = [scores["task"], "n", "rows", *(_HEADERS.get(name, name.replace("_", " ") + " %") for name in names)]
    named = [("overall", scores["overall"])]
    for level, by_name in scores.items():
        if level not in ("task", "overall"):
            named += [(f"{level.upper() if len(level) == 2 else level} {name}", values) for name, values in by_name.items()]
    rows = [(name, values["n"], values["rows"], *(_cell(column, values[column]) for column in names)) for name, values in named]
    return format_table(header, rows)


_HEADERS = {"parse_failure_rate": "unparsed %", "lmms_eval_static": "lmms-eval static %", "score": "score"}


def _cell(column: str, value: float | None) -> str:
    return f"{value:.1f}" if column == "score" and value is not None else percent(value)
