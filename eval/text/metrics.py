"""How well similarity tells meanings apart, and how much it follows words, as pure functions on arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Auc:
    value: float
    """Chance that a pair of the same meaning is more similar than one of different meaning; ties count half."""
    interval: tuple[float, float]
    """95 % percentile bootstrap interval over pairs, each sort resampled by itself."""
    n_same: int
    n_different: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"interval": list(self.interval)}


def auc(same: Floats, different: Floats) -> float:
    """Area under the ROC curve from similarities [N] and [M]: the Mann-Whitney statistic over N M, ties counted half.

    Raises:
        ValueError: one of the two is empty, or a similarity is not finite.
    """
    if not (len(same) and len(different)):
        raise ValueError("expected at least one pair of each meaning")
    both = np.concatenate([same, different])
    if not np.isfinite(both).all():
        raise ValueError("expected finite similarities")
    ranks = rankdata(both)  # ties share the mean of their ranks
    return float((ranks[: len(same)].sum() - len(same) * (len(same) + 1) / 2) / (len(same) * len(different)))


def bootstrap_aucs(scores_KP: Floats, same_P: NDArray[np.bool_], resamples: int, seed: int) -> Floats:
    """[resamples, K] AUCs of K scores on the same resampled pairs, so that their differences are paired."""
    rng = np.random.default_rng(seed)
    same, different = np.flatnonzero(same_P), np.flatnonzero(~same_P)
    out = np.empty((resamples, len(scores_KP)))
    for number in range(resamples):
        i, j = rng.choice(same, len(same)), rng.choice(different, len(different))
        out[number] = [auc(score_P[i], score_P[j]) for score_P in scores_KP]
    return out


def interval(values_R: Floats) -> tuple[float, float]:
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def rank_correlation(first_P: Floats, second_P: Floats) -> float | None:
    """Spearman's coefficient; None where one of the two is constant, which has no ranks."""
    if len(first_P) < 2 or np.ptp(first_P) == 0 or np.ptp(second_P) == 0:
        return None
    return float(spearmanr(first_P, second_P).statistic)


def rank_shares(values_P: Floats) -> Floats:
    """Rank of each value as a share of all, in (0, 1): so are encoders compared whose similarities have other ranges."""
    return (rankdata(values_P) - 0.5) / len(values_P)
