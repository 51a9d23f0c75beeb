"""Paired statistics, the same for encoders and LMMs: sums per cluster come in, intervals, p-values and power go out.

A number that is compared is a sum of ratios, value = scale * sum_s (sum_u top[u, s] / sum_u bottom[u, s]): an accuracy has one
ratio with bottom 1, an F1 score one whose bottom depends on the answers, a macro mean one a stratum. Units of a cluster (the
questions of an image, the rotations of a question) are drawn together and change sides together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import bdtr
from scipy.stats import binom, norm, t

LEVEL, POWER = 0.05, 0.8
FEWEST_CLUSTERS = 6
"""For an interval. Below, percentiles hold the truth in 73 to 85 % of samples, and no sign flip reaches p <= 0.05."""


@dataclass(frozen=True)
class Terms:
    """One run's units [U] of one measure, float64."""

    top_US: np.ndarray
    bottom_US: np.ndarray
    scale: float = 1.0

    @property
    def value(self) -> float:
        """NaN when the only ratio has bottom 0."""
        return float(_values(self.top_US.sum(0), self.bottom_US.sum(0), self.scale))


@dataclass(frozen=True)
class PairedResult:
    difference: float
    """Value of A minus value of B."""
    interval: tuple[float, float] | None
    """95 %; None with fewer than six clusters, or where they all differ alike, of which resampling shows no spread."""
    p_value: float | None
    """Two-sided; None with fewer than two clusters."""


def paired_result(a: Sequence[Terms], b: Sequence[Terms], cluster_U: np.ndarray, resamples: int, seed: int) -> PairedResult:
    """Compares two models on the same units, in the same order; of each the mean value over its runs.

    The bootstrap draws clusters of units and keeps the runs as they are: what is said holds for these runs on questions like
    these. `seeds.hierarchical_result` also covers the training of other runs.

    Args:
        a, b: one entry a run.
        cluster_U: int64, the cluster of each unit, from 0 without gaps.
    Raises:
        ValueError: no units, or units of different number.
    """
    shapes = {array.shape for terms in (*a, *b) for array in (terms.top_US, terms.bottom_US)}
    if len(cluster_U) == 0 or len(shapes) > 1:
        raise ValueError(f"expected equally long, non-empty arrays, found {sorted(shapes)}")
    pattern_PK, count_P = _patterns(np.hstack([array for t in (*a, *b) for array in (t.top_US, t.bottom_US)]), cluster_U)
    sides = _Sides(len(a), len(b), a[0].scale)
    difference = float(np.mean([terms.value for terms in a]) - np.mean([terms.value for terms in b]))
    if count_P.sum() < 2 or not np.isfinite(difference):
        return PairedResult(difference, None, None)
    interval, clusters = None, int(count_P.sum())
    if clusters >= FEWEST_CLUSTERS:
        drawn_R = _bootstrap(pattern_PK, count_P, sides, resamples, seed)
        interval = percentile_interval(drawn_R, clusters) if np.nanstd(drawn_R) > 1e-12 else None
    return PairedResult(difference, interval, _swap_test(pattern_PK, count_P, sides, resamples, seed))


def percentile_interval(drawn_R: np.ndarray, clusters: int) -> tuple[float, float]:
    """95 % percentile interval, expanded for few clusters (Hesterberg 2015, section 3.3).

    The bootstrap's spread is too small by sqrt((C - 1) / C) and its tails are the normal's instead of t's: the percentiles are
    those of the normal distribution at -sqrt(C / (C - 1)) t_(C - 1). With many clusters they are 2.5 and 97.5.
    """
    outer = 100 * norm.cdf(-np.sqrt(clusters / (clusters - 1)) * t.isf(LEVEL / 2, clusters - 1))
    low, high = np.nanpercentile(drawn_R, [outer, 100 - outer])
    return float(low), float(high)


def sign_flip_p_value(difference_C: np.ndarray, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the sum of the clusters' differences when each might as well have the other sign.

    Where clusters differ by at most one unit this is McNemar's exact test. It is exact for differences that are multiples of
    one number (right or wrong answers), by convolving binomial distributions, and else drawn (Phipson and Smyth 2010).
    """
    size_C = np.abs(difference_C[np.abs(difference_C) > 1e-12])
    if len(size_C) == 0:
        return 1.0
    observed = abs(float(difference_C.sum()))
    steps_C = _whole_steps(size_C)
    if steps_C is None:
        size_P, count_P = np.unique(size_C, return_counts=True)
        plus_RP = np.random.default_rng(seed).binomial(count_P, 0.5, (resamples, len(count_P)))
        drawn_R = np.abs((2 * plus_RP - count_P) @ size_P)
        return float((1 + np.sum(drawn_R >= observed - 1e-9)) / (1 + resamples))
    total = int(steps_C.sum())
    chance = np.ones(1)
    for step, count in zip(*np.unique(steps_C, return_counts=True), strict=True):
        spread = np.zeros(step * count + 1)
        spread[::step] = binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, spread)
    reached = np.abs(2 * np.arange(total + 1) - total)  # of the sum, when so many steps are positive
    observed_steps = round(observed * total / float(size_C.sum()))
    return float(min(1.0, chance[reached >= observed_steps].sum()))


def adjusted(p_values: Sequence[float | None], method: str) -> list[float | None]:
    """p-values adjusted for their number in the same order; None stays None and does not count.

    Args:
        method: `holm` (family-wise error, Holm 1979) or `bh` (false discovery rate, Benjamini and Hochberg 1995).
    """
    known = [p for p in p_values if p is not None]
    if not known:
        return [None] * len(p_values)
    order = np.argsort(known, kind="stable")
    rising, number = np.array(known)[order], len(known)
    if method == "holm":
        rising = np.maximum.accumulate(rising * np.arange(number, 0, -1))
    elif method == "bh":
        rising = np.minimum.accumulate((rising * number / np.arange(1, number + 1))[::-1])[::-1]
    else:
        raise ValueError(f"expected holm or bh, found {method}")
    values = np.empty(number)
    values[order] = np.minimum(rising, 1.0)
    of_known = iter(values)
    return [None if p is None else float(next(of_known)) for p in p_values]


def detectable_difference(difference_C: np.ndarray, units: int) -> float | None:
    """The smallest true difference of means that these clusters show with 80 % power at the 5 % level.

    For clusters of one unit that is right or wrong: by the exact power of McNemar's test at the observed share of discordant
    units, or at a share as large as the difference where that is larger. Else from the normal approximation
    (Connor 1987) delta = z_0.975 sqrt(V) + z_0.8 sqrt(V - delta^2 / C) with V = sum d_c^2 / units^2.

    Args:
        difference_C: A - B summed over the units of each cluster.
    Returns:
        None where no difference has that power: fewer than six units, or no cluster that differs.
    """
    clusters = len(difference_C)
    if clusters == units and np.isin(difference_C, (-1.0, 0.0, 1.0)).all():
        return _detectable_exact(units, int(np.count_nonzero(difference_C)))
    variance = float(np.sum(difference_C**2)) / units**2
    if variance == 0 or clusters < 2:
        return None
    z_level, z_power = norm.isf(LEVEL / 2), norm.isf(1 - POWER)
    # (delta - z_level s)^2 = z_power^2 (V - delta^2 / C), the larger root
    square, linear = 1 + z_power**2 / clusters, -2 * z_level * np.sqrt(variance)
    constant = (z_level**2 - z_power**2) * variance
    root = linear**2 - 4 * square * constant
    return float((-linear + np.sqrt(root)) / (2 * square)) if root >= 0 else None


@lru_cache(maxsize=4096)
def _detectable_exact(units: int, discordant: int) -> float | None:
    least, most = 0.0, 1.0
    if units < 6 or exact_power(units, 1.0, 1.0) < POWER:
        return None
    for _ in range(16):
        middle = (least + most) / 2
        if exact_power(units, middle, max(middle, discordant / units)) < POWER:
            least = middle
        else:
            most = middle
    return most


def exact_power(units: int, difference: float, discordance: float) -> float:
    """Chance that McNemar's exact test gives p <= 0.05 when A alone is right with a chance (discordance + difference) / 2."""
    spread = 8 * np.sqrt(units * discordance * (1 - discordance)) + 8
    first, last = max(0, int(units * discordance - spread)), min(units, int(units * discordance + spread))
    number_M = np.arange(first, last + 1)
    chance_M = np.diff(_chance_up_to(np.arange(first - 1, last + 1), units, discordance))
    losses_M = _largest_losses(units)[number_M]  # -1 where no outcome is significant
    ahead = (1 + difference / discordance) / 2 if discordance else 0.5
    # wins of A: at least m - losses, or at most losses
    wins_M = 1 - _chance_up_to(number_M - losses_M - 1, number_M, ahead) + _chance_up_to(losses_M, number_M, ahead)
    return float(np.sum(chance_M * np.where(losses_M >= 0, wins_M, 0.0)))


def _chance_up_to(most: np.ndarray, number: np.ndarray | int, chance: float) -> np.ndarray:
    """`scipy.stats.binom.cdf` without its checks, which take most of the time here; -1 is allowed."""
    return np.where(most < 0, 0.0, bdtr(np.maximum(most, 0), number, chance))


@lru_cache(maxsize=64)
def _largest_losses(units: int) -> np.ndarray:
    """int64 [units + 1]: of m discordant units, the most on the lesser side with which p <= 0.05; -1 for none."""
    number_M = np.arange(units + 1)
    losses_M = binom.ppf(LEVEL / 2, number_M, 0.5).astype(np.int64)
    losses_M[0] = 0
    too_many_M = binom.cdf(losses_M, number_M, 0.5) > LEVEL / 2
    return np.where(too_many_M, losses_M - 1, losses_M)


def _values(top: np.ndarray, bottom: np.ndarray, scale: float) -> np.ndarray:
    """Sums of ratios, [...]; a ratio without units, which a draw of clusters may give, counts as the mean of the others."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = top / bottom
        there = np.isfinite(ratio)
        return scale * ratio.shape[-1] * np.where(there, ratio, 0.0).sum(-1) / np.where(there.any(-1), there.sum(-1), np.nan)


def _patterns(columns_UK: np.ndarray, cluster_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows among the clusters' sums, and how many clusters have each.

    A draw of clusters is a multinomial draw of patterns: the same bootstrap at a fraction of the cost.
    """
    sum_CK = np.zeros((int(cluster_U.max()) + 1, columns_UK.shape[1]))
    np.add.at(sum_CK, cluster_U, columns_UK)
    pattern_PK, count_P = np.unique(sum_CK.round(12), axis=0, return_counts=True)
    return pattern_PK, count_P


@dataclass(frozen=True)
class _Sides:
    """How the columns of patterns belong together: for each run of A, then of B, its tops and its bottoms."""

    runs_a: int
    runs_b: int
    scale: float

    def difference(self, sum_RK: np.ndarray) -> np.ndarray:
        """Mean value over the runs of A minus that of B, [R]."""
        parts = np.split(sum_RK, 2 * (self.runs_a + self.runs_b), axis=-1)
        values = [_values(top, bottom, self.scale) for top, bottom in zip(parts[::2], parts[1::2], strict=True)]
        return np.mean(values[: self.runs_a], axis=0) - np.mean(values[self.runs_a :], axis=0)


def _bootstrap(pattern_PK: np.ndarray, count_P: np.ndarray, sides: _Sides, resamples: int, seed: int) -> np.ndarray:
    """float64 [resamples]: differences of draws of the clusters with replacement."""
    generator, clusters, drawn = np.random.default_rng(seed), int(count_P.sum()), []
    size = max(1, (1 << 23) // len(count_P))
    for start in range(0, resamples, size):
        times_RP = generator.multinomial(clusters, count_P / clusters, min(size, resamples - start))
        drawn.append(sides.difference(times_RP.astype(np.float64) @ pattern_PK))
    return np.concatenate(drawn)


def _swap_test(pattern_PK: np.ndarray, count_P: np.ndarray, sides: _Sides, resamples: int, seed: int) -> float | None:
    """Two-sided p-value when the two sides might as well change places, each cluster as a whole.

    None for several runs a side of a measure whose bottom depends on the answers: there is no run to change places with.
    """
    parts = np.split(pattern_PK, 2 * (sides.runs_a + sides.runs_b), axis=1)
    tops, bottoms = parts[::2], parts[1::2]
    if all(np.array_equal(bottoms[0], bottom) for bottom in bottoms):
        total_S = count_P @ bottoms[0]
        weight_S = np.ones(1) if len(total_S) == 1 else 1 / total_S
        difference_PS = np.mean(tops[: sides.runs_a], axis=0) - np.mean(tops[sides.runs_a :], axis=0)
        return sign_flip_p_value(np.repeat(difference_PS @ weight_S, count_P), resamples, seed)
    if sides.runs_a > 1 or sides.runs_b > 1:
        return None
    other_PK = np.hstack([tops[1], bottoms[1], tops[0], bottoms[0]])
    swapped_RP = np.random.default_rng(seed).binomial(count_P, 0.5, (resamples, len(count_P)))
    drawn_R = np.abs(sides.difference((count_P - swapped_RP) @ pattern_PK + swapped_RP @ other_PK))
    observed = abs(float(sides.difference(count_P @ pattern_PK)))
    return float((1 + np.sum(drawn_R >= observed - 1e-12)) / (1 + resamples))


def influence(terms: Terms, cluster_U: np.ndarray) -> np.ndarray:
    """float64 [C]: by how much each cluster moves the value, to first order; sums to 0."""
    total_S = terms.bottom_US.sum(0)
    ratio_S = terms.top_US.sum(0) / total_S
    return np.bincount(cluster_U, terms.scale * ((terms.top_US - ratio_S * terms.bottom_US) / total_S).sum(1))


def _whole_steps(size_C: np.ndarray) -> np.ndarray | None:
    """int64: the sizes as multiples of a common step; None when there is no such step that makes the sum small enough."""
    for divisor in (1, 2, 3, 4, 6, 10, 12, 20, 30, 60):
        steps_C = size_C * divisor
        if np.allclose(steps_C, steps_C.round(), rtol=0, atol=1e-6) and steps_C.sum() <= 100_000:
            return steps_C.round().astype(np.int64)
    return None
