"""Metrics of an image encoder as pure functions on arrays: similarities come in, values with counts and intervals go out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class Metric:
    value: float
    """Fraction in [0, 1]."""
    n: int
    """Items."""
    ties: int
    """Items that the encoder cannot decide."""
    interval: tuple[float, float]
    """95 % Wilson score interval of the value."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"interval": list(self.interval)}


def hard_negative_accuracy(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> Metric:
    """Share of items whose image is closer to its caption than to the hard negative (SugarCrepe, arXiv 2306.14610).

    A tie counts as half a hit, which is what guessing would give.

    Args:
        positive, negative: similarity of image and caption, image and negative caption, [N].
    Raises:
        ValueError: no items, or a similarity that is not finite.
    """
    if len(positive) == 0 or not (np.isfinite(positive).all() and np.isfinite(negative).all()):
        raise ValueError("expected at least one item and finite similarities")
    ties = int(np.sum(positive == negative))
    return _metric(float(np.sum(positive > negative)) + 0.5 * ties, len(positive), ties)


def retrieval_ranks(
    query_ND: NDArray[np.float32],
    gallery_MD: NDArray[np.float32],
    query_label_N: NDArray[np.int64],
    gallery_label_M: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rank (from 0) of the best correct gallery item for every query; correct is one with the query's label.

    A wrong item as similar as the best correct one ranks before it, so that a collapsed encoder does not score.

    Returns:
        ranks [N], and whether such a tie occurred [N].
    Raises:
        ValueError: a query without a correct item, or features that are not finite.
    """
    if not (np.isfinite(query_ND).all() and np.isfinite(gallery_MD).all()):
        raise ValueError("expected finite features")
    if not np.isin(query_label_N, gallery_label_M).all():
        raise ValueError("expected a correct gallery item for every query")
    ranks, ties = [], []
    for start in range(0, len(query_ND), 1024):  # bounds the similarity matrix to 1,024 rows
        similarity_BM = query_ND[start : start + 1024] @ gallery_MD.T
        correct_BM = query_label_N[start : start + 1024, None] == gallery_label_M[None, :]
        best_B1 = np.where(correct_BM, similarity_BM, -np.inf).max(axis=1, keepdims=True)
        ranks.append(((similarity_BM >= best_B1) & ~correct_BM).sum(axis=1))
        ties.append(((similarity_BM == best_B1) & ~correct_BM).any(axis=1))
    return np.concatenate(ranks), np.concatenate(ties)


def recall_at(ranks: NDArray[np.int64], ties: NDArray[np.bool_], k: int) -> Metric:
    """Share of queries with a correct item among the `k` nearest, from the ranks and ties of `retrieval_ranks`."""
    return _metric(float(np.sum(ranks < k)), len(ranks), int(ties.sum()))


def _metric(hits: float, n: int, ties: int) -> Metric:
    low, high = proportion_confint(hits, n, alpha=0.05, method="wilson")
    return Metric(hits / n, n, ties, (float(low), float(high)))
