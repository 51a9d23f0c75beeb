"""The one place where items become numbers: records of a task come in, measures with their uncertainty go out.

A record is one item of a benchmark with the score of every candidate. A measure is a mean over the records of some subtasks,
or a median rank: `lift-eval encoder` computes it for one encoder and `lift-eval compare` for two, from the same definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from statsmodels.stats.proportion import proportion_confint

RECORDS = pa.schema(
    [
        ("task", pa.string()),
        ("subtask", pa.string()),
        ("id", pa.string()),
        ("cluster", pa.string()),
        ("scores", pa.list_(pa.float32())),
        ("correct", pa.float32()),
        ("rank", pa.int32()),
        ("tie", pa.bool_()),
    ]
)
"""Columns of `records.parquet`. `id` is unique within task and subtask; items of one `cluster` (the same image) are not
independent. `correct` is 1, 0, or 0.5 for a tie that counts as half. `rank` counts from 0, or is null."""

Statistic = Literal["accuracy", "recall", "median_rank"]


@dataclass(frozen=True)
class Record:
    subtask: str
    id: str
    scores: Sequence[float]
    """Similarity of each candidate, the correct one first."""
    correct: float
    cluster: str = ""
    """What other items share with this one; nothing when empty."""
    rank: int | None = None
    tie: bool = False


@dataclass(frozen=True)
class Measure:
    """A number over the records of `subtasks`, or of the whole task."""

    name: str
    subtasks: tuple[str, ...] = ()
    """All of the task's when empty."""
    statistic: Statistic = "accuracy"
    k: int = 1
    """Recall counts an item whose rank is below k."""
    macro: bool = False
    """Mean of the subtasks' values, each weighing the same, instead of the mean over items."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"subtasks": list(self.subtasks)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Measure:
        known = {name: values[name] for name in ("name", "statistic", "k", "macro")}
        return Measure(subtasks=tuple(values["subtasks"]), **known)


@dataclass(frozen=True)
class Outcomes:
    """The records of one measure as arrays, [N]."""

    value_N: np.ndarray
    """float64: correct for an accuracy, 0 or 1 for a recall, the rank counted from 1 for a median."""
    weight_N: np.ndarray
    """float64, sums to 1."""
    stratum_N: np.ndarray
    """int64: the subtask whose mean is one term of a macro mean; 0 otherwise."""
    cluster_N: np.ndarray
    """int64, from 0."""
    ids: list[str]
    """`subtask/id`."""

    @property
    def mean(self) -> float:
        """Of the strata's means."""
        return float(np.mean(np.bincount(self.stratum_N, self.value_N) / np.bincount(self.stratum_N)))


def records_table(task: str, records: Iterable[Record]) -> pa.Table:
    """The records of one task under `RECORDS`."""
    rows = list(records)
    columns: dict[str, Any] = {
        "task": pa.repeat(pa.scalar(task), len(rows)),
        "subtask": [row.subtask for row in rows],
        "id": [row.id for row in rows],
        "cluster": [row.cluster or f"{row.subtask}/{row.id}" for row in rows],
        "scores": [list(map(float, row.scores)) for row in rows],
        "correct": [row.correct for row in rows],
        "rank": [row.rank for row in rows],
        "tie": [row.tie for row in rows],
    }
    return pa.table(columns, schema=RECORDS)


def outcomes(table: pa.Table, measure: Measure) -> Outcomes:
    """The items that `measure` is over, in the table's order.

    Raises:
        ValueError: none, a subtask without items, or a rank that is missing.
    """
    subtask_M = table["subtask"].to_numpy(zero_copy_only=False)
    if absent := set(measure.subtasks) - set(subtask_M) or not len(subtask_M):
        raise ValueError(f"{measure.name}: no records of {absent}")
    kept_N = np.flatnonzero(_inside(table, measure))
    kept, subtask_N = table.take(pa.array(kept_N)), subtask_M[kept_N]
    if measure.statistic == "accuracy":
        value_N = kept["correct"].to_numpy().astype(np.float64)
    else:
        if kept["rank"].null_count:
            raise ValueError(f"{measure.name}: records without a rank")
        rank_N = kept["rank"].to_numpy().astype(np.float64)
        value_N = (rank_N < measure.k).astype(np.float64) if measure.statistic == "recall" else rank_N + 1
    _, cluster_N = np.unique(kept["cluster"].to_numpy(zero_copy_only=False), return_inverse=True)
    strata = subtask_N if measure.macro else np.zeros(len(kept_N))
    _, stratum_N, size_S = np.unique(strata, return_inverse=True, return_counts=True)
    weight_N = 1.0 / (len(size_S) * size_S[stratum_N])
    ids = [f"{subtask}/{name}" for subtask, name in zip(subtask_N, kept["id"].to_pylist(), strict=True)]
    return Outcomes(value_N, weight_N, stratum_N, cluster_N, ids)


def _inside(table: pa.Table, measure: Measure) -> np.ndarray:
    """bool [rows of the table]: those that the measure is over."""
    if not measure.subtasks:
        return np.ones(len(table), bool)
    return np.isin(table["subtask"].to_numpy(zero_copy_only=False).astype(str), measure.subtasks)


def measured(table: pa.Table, measure: Measure) -> dict[str, Any]:
    """What `results.json` says of one measure: value, n, ties, 95 % interval (None for a single item), and its definition."""
    found = outcomes(table, measure)
    ties = int(table["tie"].to_numpy(zero_copy_only=False)[_inside(table, measure)].sum())
    if measure.statistic == "median_rank":
        value, interval = float(np.median(found.value_N)), median_interval(found.value_N, found.cluster_N)
    else:
        value, interval = found.mean, mean_interval(found)
    return measure.to_dict() | {"value": value, "n": len(found.value_N), "ties": ties, "interval": list(interval)}


def mean_interval(found: Outcomes) -> tuple[float, float]:
    """95 % Wilson score interval of a weighted mean of values in [0, 1].

    The count is the effective sample size p (1 - p) / variance, at most that of the weights (n for a mean over items). The
    variance of the mean is linearised over clusters: items of one image count for less when they are right or wrong together
    (Korn and Graubard 1998). Where all items are right or all are wrong, the count is the number of clusters, weighed by their
    size. For independent items of one stratum that are right or wrong this is Wilson's interval of a proportion.
    """
    mean = found.mean
    stratum_mean_S = np.bincount(found.stratum_N, found.value_N) / np.bincount(found.stratum_N)
    residual_N = found.weight_N * (found.value_N - stratum_mean_S[found.stratum_N])
    # a stratum of one cluster shows no variance: it is given that of the whole, for the cluster as one item
    alone_S = np.bincount(np.unique(np.stack([found.stratum_N, found.cluster_N]), axis=1)[0]) == 1
    alone_N = alone_S[found.stratum_N]
    residual_N[alone_N] = found.weight_N[alone_N] * np.sqrt(mean * (1 - mean))
    variance = float(np.sum(np.bincount(found.cluster_N, residual_N) ** 2))
    largest = 1 / float(np.sum(np.bincount(found.cluster_N, found.weight_N) ** 2))
    effective = largest if variance == 0 else min(1 / float(np.sum(found.weight_N**2)), mean * (1 - mean) / variance)
    low, high = proportion_confint(mean * effective, effective, alpha=0.05, method="wilson")
    return float(low), float(high)


def median_interval(value_N: np.ndarray, cluster_N: np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median; clusters are what is drawn."""
    order = np.argsort(value_N, kind="stable")
    sorted_N, cluster_N = value_N[order], cluster_N[order]
    generator, clusters = np.random.default_rng(seed), int(cluster_N.max()) + 1
    drawn = np.empty(resamples)
    for number in range(resamples):
        times_C = np.bincount(generator.integers(0, clusters, clusters), minlength=clusters)
        drawn[number] = _weighted_median(sorted_N, times_C[cluster_N])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _weighted_median(sorted_N: np.ndarray, times_N: np.ndarray) -> float:
    """`numpy.median` of the values repeated as often as `times_N` says."""
    reached_N = np.cumsum(times_N)
    total = int(reached_N[-1])
    lower, upper = np.searchsorted(reached_N, [(total - 1) // 2, total // 2], side="right")
    return float(sorted_N[lower] + sorted_N[upper]) / 2
