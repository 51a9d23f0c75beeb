"""Two LMMs on the same questions: records of both come in, one row a measure and category with paired statistics goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.comparison.join import by_task, same_questions
from eval.comparison.measures import Measure, measures_of
from eval.comparison.statistics import adjusted, detectable_difference, paired_result
from eval.records import Record
from lift.common.errors import UserError


def compare_records(
    records_a: Sequence[Record],
    records_b: Sequence[Record],
    *,
    name_a: str = "A",
    name_b: str = "B",
    resamples: int = 10_000,
    seed: int = 0,
    adjust: str = "holm",
) -> dict[str, Any]:
    """`rows`, `tasks`, `bootstrap` and `adjustment` of a comparison, over the tasks that both have.

    A row is a measure over all of a task or over one category. Values are fractions, except those with `scale` "points";
    differences are A - B. p-values are adjusted over the categories of one level and measure; `overall` is asked first and
    stands as it is. `only_a` and `only_b` are None for measures of which a single unit has none, such as F1.

    Raises:
        UserError: the runs have no task in common, or saw other questions in one.
    """
    tasks_a, tasks_b = by_task(records_a), by_task(records_b)
    common = [task for task in tasks_a if task in tasks_b]
    if not common:
        raise UserError(f"{name_a} and {name_b}: expected a task that both have, found {list(tasks_a)} and {list(tasks_b)}.")
    rows: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}
    for task in common:
        a, b = tasks_a[task], same_questions(tasks_a[task], tasks_b[task], name_a, name_b)
        measures = [measure for measure in measures_of(task, a) if measure in measures_of(task, b)]
        for measure in measures:
            rows += _measure_rows(task, measure, a, b, resamples, seed, adjust)
        tasks[task] = {
            "unit": "circular group" if measures[0].name == "circular" else "row",
            "measures": {measure.name: measure.meaning for measure in measures},
            "excluded": excluded(a),
        }
    bootstrap = {"resamples": resamples, "seed": seed, "interval": "95 % percentile"}
    return {"rows": rows, "tasks": tasks, "bootstrap": bootstrap, "adjustment": adjust}


def levels_of(records: Sequence[Record]) -> list[str]:
    """Names of the category levels, in the order in which the rows have them."""
    return list(dict.fromkeys(level for record in records for level in record.categories))


def excluded(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What a comparison leaves out and why: rows without a category at a level that other rows have."""
    found = []
    for level in levels_of(records):
        without = [record for record in records if not record.categories.get(level)]
        if without:
            reason = f"no {level} category: counted in overall, in no row of {level}"
            found.append({"reason": reason, "n": len(without), "first": without[0].key})
    return found


def _measure_rows(
    task: str, measure: Measure, a: list[Record], b: list[Record], resamples: int, seed: int, adjust: str
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for level in ("overall", *levels_of(a)):
        places: dict[str, list[int]] = {}
        for place, record in enumerate(a):
            if name := "overall" if level == "overall" else record.categories.get(level):
                places.setdefault(name, []).append(place)
        level_rows: list[dict[str, Any]] = []
        for name in sorted(places):
            part_a, part_b = ([side[place] for place in places[name]] for side in (a, b))
            if row := _row(measure, part_a, part_b, resamples, seed):
                place_of = {"task": task, "measure": measure.name, "primary": measure.primary, "level": level, "name": name}
                level_rows.append(place_of | row)
        if level != "overall":
            p_values = adjusted([row["p_value"] for row in level_rows], adjust)
            for row, p_adjusted in zip(level_rows, p_values, strict=True):
                row["p_adjusted"] = p_adjusted
        rows += level_rows
    return rows


def _row(measure: Measure, a: list[Record], b: list[Record], resamples: int, seed: int) -> dict[str, Any] | None:
    units_a, units_b = measure.units(a), measure.units(b)
    if not units_a.keys:
        return None
    _, cluster_U = np.unique(units_a.clusters, return_inverse=True)
    clusters = int(cluster_U.max()) + 1
    result = paired_result(units_a.terms, units_b.terms, cluster_U, resamples, seed)
    only_a = only_b = detectable = None
    if measure.discordant:
        difference_U = (units_a.terms.top_US - units_b.terms.top_US)[:, 0]
        only_a, only_b = int(np.sum(difference_U > 0)), int(np.sum(difference_U < 0))
        detectable = detectable_difference(np.bincount(cluster_U, difference_U), len(cluster_U))
    return {
        "n": len(units_a.keys),
        "clusters": clusters,
        "scale": "points" if measure.in_points else "fraction",
        "value_a": units_a.terms.value,
        "value_b": units_b.terms.value,
        "difference": result.difference,
        "interval": list(result.interval) if result.interval else None,
        "only_a": only_a,
        "only_b": only_b,
        "p_value": result.p_value,
        "p_adjusted": None,
        "unparsed_a": sum(record.prediction is None for record in a) / len(a),
        "unparsed_b": sum(record.prediction is None for record in b) / len(b),
        "detectable": detectable,
    }
