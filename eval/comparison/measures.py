"""What is measured over the records of a benchmark: a task's records come in, units with their clusters go out.

A unit is what counts as right or wrong: a question with all its rotations (circular accuracy), an image with both its questions
(MME's accuracy plus), otherwise a row. Two runs over the same records, in the same order, have the same units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.comparison.statistics import Terms
from eval.records import Record


@dataclass(frozen=True)
class Units:
    terms: Terms
    keys: list[str]
    """[U], of the unit's first record."""
    clusters: list[str]
    """[U], the records' group."""


@dataclass(frozen=True)
class Measure:
    name: str
    meaning: str
    units: Callable[[Sequence[Record]], Units]
    primary: bool = False
    discordant: bool = True
    """Whether a unit is right or wrong by itself, so that those which one run alone has right can be counted."""
    in_points: bool = False
    """A published score instead of a fraction."""


def measures_of(task: str, records: Sequence[Record]) -> tuple[Measure, ...]:
    """The measures of a benchmark, the primary one first."""
    if any(record.rotation for record in records) or task in ("mmbench", "mmbench_cn"):
        measures: tuple[Measure, ...] = CIRCULAR
    else:
        measures = {"mme": MME, "pope": POPE}.get(task, ACCURACY)
        if measures is MME and set(Counter(record.group for record in records).values()) != {2}:
            measures = ACCURACY  # the others are of images with both their questions
    if not all(record.likelihood for record in records):
        return measures
    return (*measures, CIRCULAR_LIKELIHOOD if measures is CIRCULAR else LIKELIHOOD)


def _rows(records: Sequence[Record], top: Sequence[float], bottom: Sequence[float] | None = None) -> Units:
    top_US = np.array(top, dtype=np.float64)[:, None]
    bottom_US = np.ones_like(top_US) if bottom is None else np.array(bottom, dtype=np.float64)[:, None]
    return Units(Terms(top_US, bottom_US), [record.key for record in records], [record.group for record in records])


def _accuracy(records: Sequence[Record]) -> Units:
    return _rows(records, [record.score for record in records])


def _likelihood(records: Sequence[Record]) -> Units:
    return _accuracy(_by_likelihood(records))


def _all_likely(records: Sequence[Record]) -> Units:
    return _all_right(_by_likelihood(records))


def _by_likelihood(records: Sequence[Record]) -> list[Record]:
    return [replace(record, score=record.likelihood.score if record.likelihood else 0.0) for record in records]


def _all_right(records: Sequence[Record]) -> Units:
    """A group is right when all its rows are."""
    firsts: dict[str, Record] = {}
    right: dict[str, bool] = {}
    for record in records:
        firsts.setdefault(record.group, record)
        right[record.group] = right.get(record.group, True) and record.score >= 1
    return _rows(list(firsts.values()), [float(value) for value in right.values()])


def _vanilla(records: Sequence[Record]) -> Units:
    return _accuracy([record for record in records if record.rotation == 0])


def _said_yes(record: Record) -> bool:
    return (record.prediction or "").lower() == "yes"


def _is_yes(record: Record) -> bool:
    return record.answer[0].lower() == "yes"


def _yes_counts(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([_said_yes(record) for record in records]), np.array([_is_yes(record) for record in records])


def _f1(records: Sequence[Record]) -> Units:
    said, true = _yes_counts(records)
    return _rows(records, list(2.0 * (said & true)), list(said * 1.0 + true))


def _precision(records: Sequence[Record]) -> Units:
    said, true = _yes_counts(records)
    return _rows(records, list(1.0 * (said & true)), list(1.0 * said))


def _recall(records: Sequence[Record]) -> Units:
    kept = [record for record in records if _is_yes(record)]
    return _rows(kept, [float(_said_yes(record)) for record in kept])


def _yes_ratio(records: Sequence[Record]) -> Units:
    return _rows(records, [float(_said_yes(record)) for record in records])


def _mme_score(records: Sequence[Record]) -> Units:
    """A unit is an image; each subtask has two ratios, that of the questions and that of the images with both right."""
    names = sorted({_finest(record) for record in records})
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    top_US, bottom_US = np.zeros((len(groups), 2 * len(names))), np.zeros((len(groups), 2 * len(names)))
    for number, rows in enumerate(groups.values()):
        place = 2 * names.index(_finest(rows[0]))
        top_US[number, place : place + 2] = sum(row.score for row in rows), all(row.score >= 1 for row in rows)
        bottom_US[number, place : place + 2] = len(rows), 1
    return Units(Terms(top_US, bottom_US, 100.0), [rows[0].key for rows in groups.values()], list(groups))


def _finest(record: Record) -> str:
    return list(record.categories.values())[-1] if record.categories else ""


ACCURACY = (Measure("accuracy", "mean score of the rows", _accuracy, primary=True),)
CIRCULAR = (
    Measure("circular", "share of the questions that are right in every rotation of their options", _all_right, primary=True),
    Measure("vanilla", "share of the questions whose first pass is right", _vanilla),
)
MME = (
    *ACCURACY,
    Measure("accuracy_plus", "share of the images with both questions right", _all_right),
    Measure(
        "score",
        "published score: per subtask 100 (accuracy + accuracy plus), summed over subtasks",
        _mme_score,
        discordant=False,
        in_points=True,
    ),
)
POPE = (
    *ACCURACY,
    Measure("f1", "harmonic mean of precision and recall of the answer yes", _f1, discordant=False),
    Measure("precision", "share of the answers yes that are right", _precision, discordant=False),
    Measure("recall", "share of the questions with a yes that are answered so", _recall),
    Measure("yes_ratio", "share of the rows answered yes", _yes_ratio, discordant=False),
)
LIKELIHOOD = Measure("likelihood", "share of the rows whose most probable option letter is right", _likelihood)
CIRCULAR_LIKELIHOOD = Measure(
    "likelihood", "share of the questions whose most probable option letter is right in every rotation", _all_likely
)
