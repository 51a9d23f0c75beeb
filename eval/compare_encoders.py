"""Two encoders on the same items: records of both come in; differences with paired intervals and tests per measure go out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval.comparison.statistics import Terms, adjusted, paired_result
from eval.encoder import RECORDS_FILE, RESULTS
from eval.measures import Measure, Outcomes, outcomes
from eval.output import format_table, percent, write_csv
from eval.settings import CompareSettings
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, require_file, write_json

PATHS = ("path", "images", "classes", "train", "test")
"""Settings of a task that may differ: what lies there is in the data hash."""
MISMATCH = "Run lift-eval encoder for both on the same data, with the same --protocol and --tasks."


def compare_encoders(settings: CompareSettings) -> dict[str, Any]:
    """`lift-eval compare` for two folders of `lift-eval encoder`: writes `comparison.json`, `comparison.csv`, prints a table.

    Raises:
        UserError: another protocol, other data or other items in a task that both have, or no task in common.
    """
    out = given(settings.out, "out")
    check_output_folder(out, "comparison.json")
    comparison = encoder_comparison(settings)
    with atomic_folder(out) as work:
        write_json(work / "comparison.json", comparison)
        write_csv(work / "comparison.csv", comparison["rows"])
    print(comparison_table(comparison))
    if left := comparison["only_one_has"]:
        print(f"Only one of the two has {', '.join(left)}.")
    print(f"{out}: comparison.json, comparison.csv")
    return comparison


def encoder_comparison(settings: CompareSettings) -> dict[str, Any]:
    """What `comparison.json` holds. Raises UserError as `compare_encoders` does."""
    results_a, results_b = (read_results(run) for run in (settings.run_a, settings.run_b))
    tasks = _common_tasks(settings, results_a, results_b)
    table_a, table_b = _records(settings.run_a, results_a), _records(settings.run_b, results_b)
    rows = [
        row
        for task in tasks
        for row in compare_task(task, results_a["metrics"], (table_a[task], table_b[task]), settings.resamples, settings.seed)
    ]
    return {
        "kind": "encoders",
        "name_a": settings.name_a,
        "name_b": settings.name_b,
        "protocol": results_a["protocol"],
        "bootstrap": {"resamples": settings.resamples, "seed": settings.seed, "interval": "95 % percentile", "unit": "cluster"},
        "rows": rows,
        "runs": {
            side: {"folder": str(run), "encoder": results["encoder"], "encoder_hash": results["encoder_hash"]}
            for side, run, results in (("a", settings.run_a, results_a), ("b", settings.run_b, results_b))
        },
        "data_hash": {task: results_a["data_hash"][task] for task in tasks},
        "only_one_has": sorted(results_a["data_hash"].keys() ^ results_b["data_hash"].keys()),
    }


def compare_task(
    task: str, metrics: dict[str, Any], tables: tuple[pa.Table, pa.Table], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """One row a measure. `p_holm` is adjusted within the task, over the measures that have a p-value.

    The p-value is that of the sign flip over clusters (McNemar's exact test where each item is its own cluster); a tie that
    counts as half is on the side of the encoder that is ahead. It is None for what it does not test, a mean of subtasks and a
    median rank. The interval draws clusters.

    Raises:
        UserError: the two tables hold other items.
    """
    rows = []
    for name, metric in metrics.items():
        if name.partition("/")[0] != task:
            continue
        measure = Measure.from_dict(metric)
        found_a, found_b = (outcomes(table, measure) for table in tables)
        found_b = _in_order_of(found_a, found_b, name)
        row: dict[str, Any] = {"metric": name, "statistic": measure.statistic, "n": len(found_a.ids)}
        row |= paired_difference(found_a, found_b, measure.statistic == "median_rank", resamples, seed)
        if measure.macro:
            row["p_value"] = None
        rows.append(row | {"p_holm": None})
    for row, p_holm in zip(rows, adjusted([row["p_value"] for row in rows], "holm"), strict=True):
        row["p_holm"] = p_holm
    return rows


def paired_difference(a: Outcomes, b: Outcomes, is_median: bool, resamples: int, seed: int) -> dict[str, Any]:
    """Values, difference A - B, its 95 % bootstrap interval over clusters, discordant items and the p-value over clusters."""
    if is_median:
        row = {"value_a": float(np.median(a.value_N)), "value_b": float(np.median(b.value_N))}
        interval = None
        if a.cluster_N.max() > 0:
            interval = [float(end) for end in np.percentile(_median_draws(a, b, min(resamples, 1000), seed), [2.5, 97.5])]
        row |= {"difference": row["value_a"] - row["value_b"]}
        return row | {"interval": interval, "only_a": None, "only_b": None, "p_value": None}
    result = paired_result([_terms(a)], [_terms(b)], a.cluster_N, resamples, seed)
    return {
        "value_a": a.mean,
        "value_b": b.mean,
        "difference": a.mean - b.mean,
        "interval": list(result.interval) if result.interval else None,
        "only_a": int(np.sum(a.value_N > b.value_N)),
        "only_b": int(np.sum(a.value_N < b.value_N)),
        "p_value": result.p_value,
    }


def _terms(found: Outcomes) -> Terms:
    """The mean over strata as a sum of ratios."""
    strata = int(found.stratum_N.max()) + 1
    bottom_NS = np.eye(strata)[found.stratum_N]
    return Terms(found.value_N[:, None] * bottom_NS, bottom_NS, 1 / strata)


def _median_draws(a: Outcomes, b: Outcomes, resamples: int, seed: int) -> np.ndarray:
    clusters = int(a.cluster_N.max()) + 1
    order = np.argsort(a.cluster_N, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(a.cluster_N))[:-1])
    generator, drawn = np.random.default_rng(seed), np.empty(resamples)
    for number in range(resamples):
        rows = np.concatenate([members[cluster] for cluster in generator.integers(0, clusters, clusters)])
        drawn[number] = np.median(a.value_N[rows]) - np.median(b.value_N[rows])
    return drawn


def comparison_table(comparison: dict[str, Any]) -> str:
    """`comparison.json` of two encoders as text: percent, and plain numbers for median ranks."""
    a, b = comparison["name_a"], comparison["name_b"]
    rows: list[tuple[object, ...]] = []
    for row in comparison["rows"]:
        plain = row["statistic"] == "median_rank"
        values = [f"{row[key]:g}" if plain else percent(row[key]) for key in ("value_a", "value_b")]
        numbers: list[float] = [row["difference"], *(row["interval"] or [])]
        signed = [f"{number:+g}" if plain else percent(number, signed=True) for number in numbers]
        interval = f"[{signed[1]}, {signed[2]}]" if row["interval"] else "–"
        discordant = "–" if row["only_a"] is None else f"{row['only_a']}:{row['only_b']}"
        p_values = ["–" if row[key] is None else f"{row[key]:.3g}" for key in ("p_value", "p_holm")]
        rows.append((row["metric"], row["n"], *values, signed[0], interval, discordant, *p_values))
    header = ["%", "n", a, b, "difference", "95 % interval", f"only {a}:{b}", "p", "p (Holm)"]
    return format_table(header, rows)


def read_results(run: Path) -> dict[str, Any]:
    """Raises UserError when `run` holds no results of `lift-eval encoder`."""
    results = read_json(run / RESULTS, "results of an encoder")
    expected = {"encoder", "encoder_hash", "protocol", "data_hash", "settings", "metrics", "tasks"}
    if not isinstance(results, dict) or not expected <= results.keys():
        raise UserError(f"{run / RESULTS}: expected results of lift-eval encoder, found something else. Measure it again.")
    return results


def _common_tasks(settings: CompareSettings, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    where = f"{settings.run_a} and {settings.run_b}"
    if a["protocol"] != b["protocol"]:
        raise UserError(f"{where}: expected one protocol, found {a['protocol']} and {b['protocol']}. {MISMATCH}")
    tasks = [task for task in a["data_hash"] if task in b["data_hash"]]
    if not tasks:
        raise UserError(f"{where}: expected a task that both have, found {list(a['data_hash'])} and {list(b['data_hash'])}.")
    for task in tasks:
        if a["data_hash"][task] != b["data_hash"][task]:
            counts = [len(results["tasks"][task]["missing"]) for results in (a, b)]
            raise UserError(
                f"{where}: {task} was measured on other data (images missing: {counts[0]} and {counts[1]}). {MISMATCH}"
            )
        for name, value in a["settings"][task].items():
            if name not in PATHS and value != b["settings"][task].get(name):
                raise UserError(
                    f"{where}: {task} was measured with {name} {value} and {b['settings'][task].get(name)}. {MISMATCH}"
                )
    return tasks


def _records(run: Path, results: dict[str, Any]) -> dict[str, pa.Table]:
    path = require_file(run / RECORDS_FILE, "the records of lift-eval encoder")
    try:
        table = pq.read_table(path)
        tasks = table["task"].to_numpy(zero_copy_only=False)
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{path}: expected the records of lift-eval encoder: {error}. Run it again.") from error
    return {task: table.filter(pa.array(tasks == task)) for task in results["data_hash"]}


def _in_order_of(a: Outcomes, b: Outcomes, name: str) -> Outcomes:
    """`b` with its items in the order of `a`. Raises UserError when they are others, or an id occurs twice."""
    if a.ids == b.ids and len(set(a.ids)) == len(a.ids):
        return b
    place = {identifier: number for number, identifier in enumerate(b.ids)}
    if len(place) < len(b.ids) or len(set(a.ids)) < len(a.ids) or place.keys() != set(a.ids):
        only = sorted(place.keys() ^ set(a.ids))
        raise UserError(f"{name}: expected the same items in both, each once; first that is not: {only[:1]}. {MISMATCH}")
    order = np.array([place[identifier] for identifier in a.ids])
    return Outcomes(b.value_N[order], b.weight_N[order], b.stratum_N[order], b.cluster_N[order], a.ids)
