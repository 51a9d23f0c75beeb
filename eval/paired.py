"""Paired statistics of two models: right or wrong per question group comes in, the difference with its uncertainty goes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests


@dataclass(frozen=True)
class PairedResult:
    n: int
    difference: float
    """Accuracy of A minus accuracy of B, a fraction."""
    interval: tuple[float, float] | None
    """95 % percentile bootstrap interval of the difference; None for fewer than two groups."""
    only_a: int
    """Groups that A has right and B wrong."""
    only_b: int
    p_value: float
    """Exact two-sided McNemar test."""


def paired_result(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], resamples: int, seed: int) -> PairedResult:
    """Compares two models on the same question groups, which are the unit that is resampled.

    Args:
        correct_a, correct_b: [N], in the same order.
    Raises:
        ValueError: no groups, or arrays of different length.
    """
    if len(correct_a) == 0 or correct_a.shape != correct_b.shape:
        raise ValueError(f"expected two equally long, non-empty arrays, found {correct_a.shape} and {correct_b.shape}")
    difference = correct_a.astype(float) - correct_b.astype(float)
    only_a, only_b = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    both, neither = int(np.sum(correct_a & correct_b)), int(np.sum(~correct_a & ~correct_b))
    test = mcnemar([[both, only_a], [only_b, neither]], exact=True)
    interval = None
    if len(difference) > 1:
        rng = np.random.default_rng(seed)
        drawn = bootstrap((difference,), np.mean, n_resamples=resamples, method="percentile", rng=rng, batch=1000)
        interval = (float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))
    return PairedResult(len(difference), float(difference.mean()), interval, only_a, only_b, float(test.pvalue))


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method, in the same order."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []
