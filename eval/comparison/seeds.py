"""Several training runs a model: how much of a difference is the seed's, and what holds for seeds and questions not seen.

Runs of a side are crossed with the questions: every run answers all of them. The variance of the difference of means is taken
as V = V_seed(A) + V_seed(B) + V_question: V_seed = s^2 / S of the runs' values, V_question that of the mean over runs,
linearised over clusters. Each contains the interaction of run and question, which is thus counted twice rather than taken out
as in Searle, Casella and McCulloch (1992, chapter 4): an estimate of a variance with one or two degrees of freedom, less
another, is too often zero. Degrees of freedom are Satterthwaite's (1946).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from eval.comparison.statistics import LEVEL, POWER, PairedResult, Terms, influence

FEW_SEEDS = 5


def hierarchical_result(a: Sequence[Terms], b: Sequence[Terms], cluster_U: np.ndarray) -> tuple[PairedResult, float | None]:
    """The difference of two models with at least two runs each: Welch's t over seeds and questions.

    Returns:
        The result, and the smallest true difference that these seeds and questions show with 80 % power.
    """
    values = [np.array([terms.value for terms in side]) for side in (a, b)]
    influences = [np.stack([influence(terms, cluster_U) for terms in side]) for side in (a, b)]  # [S, C]
    difference, clusters = float(values[0].mean() - values[1].mean()), influences[0].shape[1]
    if not np.isfinite(difference):
        return PairedResult(difference, None, None), None
    question = clusters / (clusters - 1) * float(np.sum((influences[0].mean(0) - influences[1].mean(0)) ** 2))
    seed_parts = [float(np.var(value_S, ddof=1)) / len(value_S) for value_S in values]
    variance = sum(seed_parts) + question
    if variance == 0:
        return PairedResult(difference, None, None), None
    squares = sum(seed**2 / (len(value_S) - 1) for seed, value_S in zip(seed_parts, values, strict=True))
    freedom = variance**2 / (squares + question**2 / (clusters - 1))
    deviation_of_difference = np.sqrt(variance)
    reach = float(t.isf(LEVEL / 2, freedom)) * deviation_of_difference
    p_value = float(2 * t.sf(abs(difference) / deviation_of_difference, freedom))
    detectable = float((t.isf(LEVEL / 2, freedom) + t.isf(1 - POWER, freedom)) * deviation_of_difference)
    return PairedResult(difference, (difference - reach, difference + reach), p_value), detectable


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation between runs (n - 1 in the denominator); None for one run."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def seeds_statement(runs_a: int, runs_b: int) -> dict[str, Any]:
    """What the intervals and tests of a comparison with several runs cover, and a warning where that is little."""
    both = runs_a > 1 and runs_b > 1
    warning = None
    if not both:
        single = "A" if runs_a == 1 else "B"
        warning = f"{single} has one run: intervals and tests cover other questions, not other training runs."
    elif min(runs_a, runs_b) < FEW_SEEDS:
        warning = (
            f"{runs_a} and {runs_b} runs tell little about the spread between seeds; the intervals are wide for it, and they "
            "rest on the seeds' values being normally distributed."
        )
    return {
        "runs_a": runs_a,
        "runs_b": runs_b,
        "covers": "seeds and questions" if both else "questions only",
        "test": "Welch's t over seeds and questions" if both else "sign flip over clusters, of means over runs",
        "warning": warning,
    }
