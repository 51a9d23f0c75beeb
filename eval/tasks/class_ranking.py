"""Where the right class stands among all: scores of every class come in, ranks, records and tables per class go out.

What zero-shot classification, the linear probe and k-NN have in common, so that their numbers mean the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from eval.measures import Measure, Record
from eval.tasks import Scored
from eval.tasks.class_images import LabelledImages

KEPT_SCORES = 5
"""Scores of wrong classes that a record keeps."""
CONFUSIONS = 50
"""Pairs of classes in the table of confusions."""


@dataclass(frozen=True)
class ClassRanks:
    """Of N images among C classes."""

    rank_N: np.ndarray
    """int64, from 0: how many other classes score at least as much as the right one. A tie is thus wrong, and an encoder that
    gives every class the same score gets nothing right. What is not comparable (NaN) counts as at least as much."""
    tie_N: np.ndarray
    """bool: the right class shares the first place."""
    predicted_N: np.ndarray
    """int64: the right class where its rank is 0, else the best other, of equal ones the first."""
    scores_NK: np.ndarray
    """float32: the right class's score, then the best others' in falling order."""


def rank_classes(scores_NC: np.ndarray, label_N: np.ndarray) -> ClassRanks:
    """Ranks by score, higher being better; `label_N` is the right class of each row."""
    rows = np.arange(len(label_N))
    own_N1 = scores_NC[rows, label_N][:, None]
    rank_N = scores_NC.shape[1] - 1 - np.sum(scores_NC < own_N1, axis=1)
    tie_N = (rank_N > 0) & ~np.any(scores_NC > own_N1, axis=1)
    others_NC = scores_NC.astype(np.float64)
    others_NC[rows, label_N] = -np.inf
    kept = min(KEPT_SCORES, scores_NC.shape[1] - 1)
    best_NK = np.argsort(-others_NC, axis=1, kind="stable")[:, :kept]
    predicted_N = np.where(rank_N == 0, label_N, best_NK[:, 0] if kept else label_N)
    scores_NK = np.concatenate([own_N1, np.take_along_axis(scores_NC, best_NK, axis=1)], axis=1).astype(np.float32)
    return ClassRanks(rank_N.astype(np.int64), tie_N, predicted_N.astype(np.int64), scores_NK)


def concatenated(parts: Iterable[ClassRanks]) -> ClassRanks:
    rank, tie, predicted, scores = zip(
        *((part.rank_N, part.tie_N, part.predicted_N, part.scores_NK) for part in parts), strict=True
    )
    return ClassRanks(np.concatenate(rank), np.concatenate(tie), np.concatenate(predicted), np.concatenate(scores))


def class_results(data: LabelledImages, ranks: ClassRanks) -> Scored:
    """Records (subtask: the class) and the measures top1, top5 and mean_per_class.

    With five classes or fewer there is no top5: every image would count. `details` has the accuracy per class and the most
    frequent confusions, as (true, predicted, count).
    """
    titles = data.titles()
    rows = zip(data.ids, data.label_N.tolist(), ranks.rank_N.tolist(), ranks.tie_N.tolist(), ranks.scores_NK, strict=True)
    records = [
        Record(titles[label], identifier, scores.tolist(), float(rank == 0), rank=rank, tie=tie)
        for identifier, label, rank, tie, scores in rows
    ]
    measures = [Measure("top1"), Measure("mean_per_class", macro=True)]
    if len(titles) > 5:
        measures.insert(1, Measure("top5", statistic="recall", k=5))
    images_C = np.bincount(data.label_N, minlength=len(titles))
    right_C = np.bincount(data.label_N[ranks.rank_N == 0], minlength=len(titles))
    per_class = {titles[c]: {"n": int(images_C[c]), "top1": float(right_C[c] / images_C[c])} for c in np.flatnonzero(images_C)}
    return Scored(records, measures, {"per_class": per_class, "confusions": confusions(titles, data.label_N, ranks)})


def confusions(titles: list[str], label_N: np.ndarray, ranks: ClassRanks) -> list[tuple[str, str, int]]:
    """(true, predicted, count) of the wrong answers, the most frequent first."""
    wrong_N = ranks.rank_N > 0
    pairs = Counter(zip(label_N[wrong_N].tolist(), ranks.predicted_N[wrong_N].tolist(), strict=True))
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:CONFUSIONS]
    return [(titles[true], titles[predicted], count) for (true, predicted), count in ordered]
