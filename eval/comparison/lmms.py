"""Two LMMs on the same questions: records of both come in, one row a measure and category with paired statistics goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.comparison.join import by_task, same_questions
from eval.comparison.measures import Measure, measures_of
from eval.comparison.seeds import deviation, hierarchical_result, seeds_statement
from eval.comparison.statistics import adjusted, detectable_difference, paired_result
from eval.records import Record
from lift.common.errors import UserError

Run = tuple[str, Sequence[Record]]


def compare_records(
    records_a: Sequence[Record], records_b: Sequence[Record], name_a: str = "A", name_b: str = "B", **options: Any
) -> dict[str, Any]:
    """`compare_runs` of one run a side."""
    return compare_runs([(name_a, records_a)], [(name_b, records_b)], **options)


def compare_runs(
    runs_a: Sequence[Run], runs_b: Sequence[Run], *, resamples: int = 10_000, seed: int = 0, adjust: str = "holm"
) -> dict[str, Any]:
    """`rows`, `tasks`, `bootstrap`, `adjustment` and `seeds` of a comparison, over the tasks that all runs have.

    A row is a measure over all of a task or over one category. Values are fractions, except those with `scale` "points";
    differences are A - B. p-values are adjusted over the categories of one level and measure; `overall` is asked first and
    stands as it is. `only_a`, `only_b` and `detectable` are None for measures of which a single unit has none, such as F1.
    With several runs a side the values are means over them, `only_a` counts the units whose mean is higher in A, and a row also
    has `seeds`: the runs' own values and their standard deviations.

    Args:
        runs_a, runs_b: (name for messages, records) of each run.
    Raises:
        UserError: the runs have no task in common, or saw other questions in one.
    """
    tasks_of = [by_task(records) for _, records in (*runs_a, *runs_b)]
    names = [name for name, _ in (*runs_a, *runs_b)]
    common = [task for task in tasks_of[0] if all(task in tasks for tasks in tasks_of)]
    if not common:
        found = " and ".join(str(list(tasks)) for tasks in tasks_of)
        raise UserError(f"{' and '.join(names)}: expected a task that all have, found {found}.")
    rows: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}
    for task in common:
        # the run with images knows best which rows belong together
        reference = next((place for place, tasks in enumerate(tasks_of) if any(r.images for r in tasks[task])), 0)
        first = tasks_of[reference][task]
        aligned = [
            same_questions(first, tasks[task], names[reference], name) for name, tasks in zip(names, tasks_of, strict=True)
        ]
        sides = aligned[: len(runs_a)], aligned[len(runs_a) :]
        measures = [m for m in measures_of(task, first) if all(m in measures_of(task, records) for records in aligned)]
        for measure in measures:
            rows += _measure_rows(task, measure, *sides, resamples, seed, adjust)
        tasks[task] = {
            "unit": "circular group" if measures[0].name == "circular" else "row",
            "measures": {measure.name: measure.meaning for measure in measures},
            "excluded": excluded(first),
        }
    bootstrap = {"resamples": resamples, "seed": seed, "interval": "95 % percentile, expanded for few clusters"}
    seeds = None if len(names) == 2 else seeds_statement(len(runs_a), len(runs_b))
    return {"rows": rows, "tasks": tasks, "bootstrap": bootstrap, "adjustment": adjust, "seeds": seeds}


def levels_of(records: Sequence[Record]) -> list[str]:
    """Names of the category levels, in the order in which the rows have them."""
    return list(dict.fromkeys(level for record in records for level in record.categories))


def excluded(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What a comparison leaves out and why: rows without a category at a level that others have, categories of one cluster."""
    found = []
    for level in levels_of(records):
        without = [record for record in records if not record.categories.get(level)]
        if without:
            reason = f"no {level} category: counted in overall, in no row of {level}"
            found.append({"reason": reason, "n": len(without), "first": without[0].key})
        clusters: dict[str, dict[str, list[Record]]] = {}
        for record in records:
            if name := record.categories.get(level):
                clusters.setdefault(name, {}).setdefault(record.group, []).append(record)
        for name, groups in clusters.items():
            if len(groups) == 1:
                ((first, *others),) = groups.values()
                reason = f"{level} {name} has one question or image: no interval, no p, none of the adjusted tests"
                found.append({"reason": reason, "n": 1 + len(others), "first": first.key, "level": level, "category": name})
    return found


def _measure_rows(
    task: str,
    measure: Measure,
    runs_a: Sequence[list[Record]],
    runs_b: Sequence[list[Record]],
    resamples: int,
    seed: int,
    adjust: str,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first = runs_a[0]
    for level in ("overall", *levels_of(first)):
        places: dict[str, list[int]] = {}
        for place, record in enumerate(first):
            if name := "overall" if level == "overall" else record.categories.get(level):
                places.setdefault(name, []).append(place)
        level_rows: list[dict[str, Any]] = []
        for name in sorted(places):
            parts_a, parts_b = ([[run[place] for place in places[name]] for run in runs] for runs in (runs_a, runs_b))
            if row := _row(measure, parts_a, parts_b, resamples, seed):
                place_of = {"task": task, "measure": measure.name, "primary": measure.primary, "level": level, "name": name}
                level_rows.append(place_of | row)
        if level != "overall":
            p_values = adjusted([row["p_value"] for row in level_rows], adjust)
            for row, p_adjusted in zip(level_rows, p_values, strict=True):
                row["p_adjusted"] = p_adjusted
        rows += level_rows
    return rows


def _row(
    measure: Measure, runs_a: list[list[Record]], runs_b: list[list[Record]], resamples: int, seed: int
) -> dict[str, Any] | None:
    units = measure.units(runs_a[0])
    if not units.keys:
        return None
    terms_a, terms_b = ([measure.units(records).terms for records in runs] for runs in (runs_a, runs_b))
    values_a, values_b = ([terms.value for terms in side] for side in (terms_a, terms_b))
    _, cluster_U = np.unique(units.clusters, return_inverse=True)
    detectable = None
    if len(runs_a) > 1 and len(runs_b) > 1 and cluster_U.max() > 0:
        result, detectable = hierarchical_result(terms_a, terms_b, cluster_U)
    else:
        result = paired_result(terms_a, terms_b, cluster_U, resamples, seed)
    only_a = only_b = None
    if measure.discordant:
        mean_a, mean_b = (np.mean([terms.top_US[:, 0] for terms in side], axis=0) for side in (terms_a, terms_b))
        difference_U = (mean_a - mean_b).round(12)
        only_a, only_b = int(np.sum(difference_U > 0)), int(np.sum(difference_U < 0))
        if detectable is None:
            detectable = detectable_difference(np.bincount(cluster_U, difference_U), len(cluster_U))
    row: dict[str, Any] = {
        "n": len(units.keys),
        "clusters": int(cluster_U.max()) + 1,
        "scale": "points" if measure.in_points else "fraction",
        "value_a": _number(float(np.mean(values_a))),
        "value_b": _number(float(np.mean(values_b))),
        "difference": _number(result.difference),
        "interval": list(result.interval) if result.interval else None,
        "only_a": only_a,
        "only_b": only_b,
        "p_value": result.p_value,
        "p_adjusted": None,
        "unparsed_a": _unparsed(runs_a),
        "unparsed_b": _unparsed(runs_b),
        "detectable": detectable,
    }
    if len(runs_a) > 1 or len(runs_b) > 1:
        row["seeds"] = {
            "values_a": [_number(value) for value in values_a],
            "values_b": [_number(value) for value in values_b],
            "deviation_a": deviation(values_a),
            "deviation_b": deviation(values_b),
        }
    return row


def _number(value: float) -> float | None:
    """None for a value that does not exist, such as the precision of a run that never says yes."""
    return float(value) if np.isfinite(value) else None


def _unparsed(runs: list[list[Record]]) -> float:
    return sum(record.prediction is None for records in runs for record in records) / sum(map(len, runs))
