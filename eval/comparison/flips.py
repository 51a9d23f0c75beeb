"""The questions that tell two runs apart: the records of both come in, the units that exactly one has right go out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.records import Record


def find_flips(records_a: Sequence[Record], records_b: Sequence[Record]) -> list[dict[str, Any]]:
    """One entry for each group with rotations, and for each row without, that exactly one run has fully right (score 1).

    Both runs hold the same rows (`eval.comparison.join.same_questions`). `passes` has every rotation, in order, with what both
    runs answered; question, options, answer, images and categories are those of the first pass.
    """
    of_b = {(record.task, record.key): record for record in records_b}
    circular = {record.task for record in records_a if record.rotation}
    units: dict[tuple[str, str, str], list[Record]] = {}
    for record in records_a:
        place = ("group", record.group) if record.task in circular else ("row", record.key)
        units.setdefault((record.task, *place), []).append(record)
    flips = []
    for rows in units.values():
        rows = sorted(rows, key=lambda row: row.rotation)
        others = [of_b[row.task, row.key] for row in rows]
        right_a, right_b = (all(row.score >= 1 for row in side) for side in (rows, others))
        if right_a == right_b:
            continue
        first = rows[0]
        flips.append(
            {
                "task": first.task,
                "key": first.key,
                "group": first.group,
                "right": "a" if right_a else "b",
                "categories": first.categories,
                "question": first.question,
                "options": first.options,
                "answer": first.answer,
                "images": first.images or others[0].images,
                "passes": [_pass(a, b) for a, b in zip(rows, others, strict=True)],
            }
        )
    return flips


def _pass(a: Record, b: Record) -> dict[str, Any]:
    return {
        "rotation": a.rotation,
        "options": a.options,
        "answer": a.answer,
        "response_a": a.response,
        "response_b": b.response,
        "prediction_a": a.prediction,
        "prediction_b": b.prediction,
        "correct_a": a.score >= 1,
        "correct_b": b.score >= 1,
    }
