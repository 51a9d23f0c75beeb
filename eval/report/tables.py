"""Sentences and tables of the report: rows of a comparison come in, what the template prints goes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.output import percent
from eval.report.names import level_label, task_label

SIGNIFICANT = 0.05


def p_of(row: dict[str, Any]) -> float | None:
    """Adjusted where several categories were tested together."""
    p: float | None = row["p_value"] if row["p_adjusted"] is None else row["p_adjusted"]
    return p


def ahead(row: dict[str, Any]) -> str:
    """`a`, `b` or `neither`: by the exact test where there is one, since an interval is too narrow where few questions differ.

    A measure without a test, such as F1, is told by its interval.
    """
    p, interval = p_of(row), row["interval"]
    told = p < SIGNIFICANT if p is not None else interval is not None and (interval[0] > 0 or interval[1] < 0)
    if not told or not row["difference"]:
        return "neither"
    return "a" if row["difference"] > 0 else "b"


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float | None, scale: str = "fraction", signed: bool = False) -> str:
    """A fraction in percent, a published score in points; a dash for None."""
    points = "" if value is None else f"{value:+,.1f}" if signed else f"{value:,.1f}"
    text = points if points and scale == "points" else percent(value, signed)
    return text.replace("-", "−")  # the minus sign, as wide as the plus


def interval_text(interval: Sequence[float] | None, scale: str = "fraction") -> str:
    return "–" if interval is None else " to ".join(amount(bound, scale, signed=True) for bound in interval)


def without_nan(value: Any) -> Any:
    """NaN (a measure that these questions do not define) becomes None, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def overall_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The primary measure of every task, with `label` and `ahead`."""
    rows = [row for row in comparison["rows"] if row["primary"] and row["level"] == "overall"]
    return [row | {"label": task_label(row["task"]), "ahead": ahead(row)} for row in rows]


def headline(comparison: dict[str, Any]) -> str:
    """One sentence that says what was found and how sure it is."""
    a, b, rows = comparison["name_a"], comparison["name_b"], overall_rows(comparison)
    if len(rows) > 1:
        return _headline_of_many(a, b, rows)
    (row,) = rows
    text = (
        f"On {row['label']}, {a} reaches {percent(row['value_a'])} % and {b} {percent(row['value_b'])} % "
        f"({row['measure'].replace('_', ' ')}, n = {row['n']:,}): a difference of {amount(row['difference'], signed=True)} "
        "points"
    )
    if row["interval"] is None:
        return f"{text}, without an interval: so few groups of questions, or all alike, say nothing about others."
    text += f" (95 % interval {interval_text(row['interval'])}"
    text += f"; p {p_text(p_of(row))})" if p_of(row) is not None else ")"
    if row["ahead"] == "neither":
        return f"{text}. These questions do not tell which of the two is ahead."
    return f"{text}. On questions like these, {a if row['ahead'] == 'a' else b} is ahead."


def _headline_of_many(a: str, b: str, rows: Sequence[dict[str, Any]]) -> str:
    labels = {side: [row["label"] for row in rows if row["ahead"] == side] for side in ("a", "b", "neither")}
    if not labels["a"] + labels["b"]:
        names = ", ".join(labels["neither"])
        text = f"These questions do not tell {a} and {b} apart on any of {len(rows)} benchmarks ({names})"
        return f"{text}, each tested by itself at 5 %."
    told = {side: f"{len(names)} ({', '.join(names)})" if names else "none" for side, names in labels.items()}
    of_a = told["a"].replace(" (", f" of {len(rows)} benchmarks (", 1) if labels["a"] else f"none of {len(rows)} benchmarks"
    rest = (
        f"; {', '.join(labels['neither'])} {'does' if len(labels['neither']) == 1 else 'do'} not tell"
        if labels["neither"]
        else ""
    )
    return f"{a} is ahead on {of_a}, {b} on {told['b']}{rest}. Each is tested by itself at 5 %."


def task_tables(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One table a task: the rows of its primary measure by level, each with the other measures of the same name beside it."""
    entries = []
    for task, about in comparison["tasks"].items():
        rows = [row for row in comparison["rows"] if row["task"] == task]
        found = {(row["level"], row["name"], row["measure"]): row for row in rows}
        others = list(dict.fromkeys(row["measure"] for row in rows if not row["primary"]))
        primary = [
            row | {"ahead": ahead(row), "others": [found.get((row["level"], row["name"], measure)) for measure in others]}
            for row in rows
            if row["primary"]
        ]
        levels = dict.fromkeys(row["level"] for row in primary)
        entries.append(
            about
            | {
                "label": task_label(task),
                "measure": primary[0]["measure"],
                "others": others,
                "levels": [(level_label(level), [row for row in primary if row["level"] == level]) for level in levels],
            }
        )
    return entries


COLUMNS = (
    "part", "task", "measure", "primary", "level", "name", "n", "clusters", "scale", "value_a", "value_b", "difference",
    "low", "high", "only_a", "only_b", "p_value", "p_adjusted", "unparsed_a", "unparsed_b", "detectable",
)  # fmt: skip


def csv_rows(comparison: dict[str, Any], encoders: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The comparison's rows (`part` lmm) and the encoders' (`part` encoder), under one header."""
    empty = dict.fromkeys(COLUMNS)
    rows = []
    for row in comparison["rows"]:
        low, high = row["interval"] or (None, None)
        rows.append(empty | {"part": "lmm", **{k: row.get(k) for k in COLUMNS if k in row}, "low": low, "high": high})
    for row in encoders["rows"] if encoders else []:
        task, _, measure = row["metric"].partition("/")
        low, high = row["interval"] or (None, None)
        values = {"part": "encoder", "task": task, "measure": measure, "low": low, "high": high, "p_adjusted": row["p_holm"]}
        values["scale"] = "rank" if row["statistic"] == "median_rank" else "fraction"
        rows.append(empty | {k: row[k] for k in COLUMNS if k in row} | values)
    return rows
