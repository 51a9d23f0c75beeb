"""What two text encoders make of sentence pairs: similarities, and every figure that is made of them."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.text.metrics import Auc, Floats, auc, bootstrap_aucs, interval, rank_correlation, rank_shares
from eval.text.pairs import Pair, word_overlap
from eval.text.sides import TextSide

LISTED = 12
"""Pairs in each list."""
READING = (
    "0.5 is guessing, and what an encoder that knows nothing gets: below it, words outweigh meaning. The pairs are chosen so "
    "that word overlap alone scores near 0. Against exchanged sentences (each first sentence with the second of another "
    "pair), where words hardly help, a higher AUC is more meaning. Read the two together: a low second figure makes the first "
    "one noise."
)
CIRCULAR = "not computed: without images the encoders themselves chose which captions count as the same meaning"


@dataclass(frozen=True)
class Measured:
    """The pairs with what was measured of each; the arrays are [P]."""

    pairs: list[Pair]
    overlap: Floats
    a: Floats
    """Cosine similarity under encoder A."""
    b: Floats
    repaired_KN: Floats | None = None
    """Scores under A, under B and by word overlap of the pairs of the same meaning with their second sentences exchanged."""

    @property
    def same(self) -> NDArray[np.bool_]:
        return np.array([pair.same_meaning for pair in self.pairs])


def measure(pairs: list[Pair], a: TextSide, b: TextSide, seed: int) -> Measured:
    """Encodes each distinct sentence once with each encoder; the seed is that of the exchanged sentences."""
    distinct = sorted({sentence for pair in pairs for sentence in (pair.first, pair.second)})
    row = {sentence: number for number, sentence in enumerate(distinct)}
    first, second = (np.array([row[getattr(pair, side)] for pair in pairs]) for side in ("first", "second"))

    other = exchange(np.flatnonzero([pair.same_meaning for pair in pairs]), seed)
    left, right = np.concatenate([first, first[other[0]]]), np.concatenate([second, second[other[1]]])

    def similarity(side: TextSide) -> Floats:
        feature_ND = side.encode(distinct).astype(np.float64)
        return (feature_ND[left] * feature_ND[right]).sum(axis=1)

    overlap = np.array([word_overlap(distinct[i], distinct[j]) for i, j in zip(left, right, strict=True)])
    scores = np.stack([similarity(a), similarity(b), overlap])
    of_a, of_b, of_words = scores[:, : len(pairs)]
    return Measured(pairs, of_words, of_a, of_b, scores[:, len(pairs) :])


def exchange(chosen_N: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs `chosen_N` in a random order, and each one's neighbour, never itself; nothing of fewer than two."""
    order = np.random.default_rng(seed).permutation(chosen_N)
    return (order, np.roll(order, 1)) if len(order) > 1 else (order[:0], order[:0])


def analyse(measured: Measured, resamples: int, seed: int, circular: bool) -> dict[str, Any]:
    """What is printed and written: correlations, AUCs, figures by kind and the lists of pairs.

    Args:
        circular: the encoders chose the pairs, so that no AUC is given.
    """
    same_P = measured.same
    scores_KP = np.stack([measured.a, measured.b, measured.overlap])
    return {
        "pairs": {"n": len(same_P), "same_meaning": int(same_P.sum()), "different_meaning": int((~same_P).sum())},
        "spearman": {
            "a_overlap": rank_correlation(measured.a, measured.overlap),
            "b_overlap": rank_correlation(measured.b, measured.overlap),
            "a_b": rank_correlation(measured.a, measured.b),
        },
        "auc": CIRCULAR if circular else aucs(scores_KP, same_P, resamples, seed),
        "auc_exchanged": None if circular else _auc_exchanged(measured, scores_KP, resamples, seed),
        "bootstrap": {"resamples": resamples, "seed": seed},
        "kinds": [_kind_row(measured, kind, circular) for kind in dict.fromkeys(pair.kind for pair in measured.pairs)],
        "lists": lists(measured),
    }


def aucs(scores_KP: Floats, same_P: NDArray[np.bool_], resamples: int, seed: int) -> dict[str, Any]:
    """AUC of encoder A, B and of word overlap alone, and A - B on the same resamples."""
    drawn_RK = bootstrap_aucs(scores_KP, same_P, resamples, seed)
    values = [auc(score_P[same_P], score_P[~same_P]) for score_P in scores_KP]
    sizes = int(same_P.sum()), int((~same_P).sum())
    found: dict[str, Any] = {
        name: Auc(value, interval(drawn_RK[:, k]), *sizes).to_dict()
        for k, (name, value) in enumerate(zip(("a", "b", "overlap"), values, strict=True))
    }
    difference = {"value": values[0] - values[1], "interval": list(interval(drawn_RK[:, 0] - drawn_RK[:, 1]))}
    return found | {"a_minus_b": difference}


def _auc_exchanged(measured: Measured, scores_KP: Floats, resamples: int, seed: int) -> dict[str, Any] | None:
    """AUC of the pairs of the same meaning against the same sentences wrongly paired, where words hardly help."""
    if measured.repaired_KN is None or measured.repaired_KN.shape[1] == 0:
        return None
    right_KN = scores_KP[:, measured.same]
    both = np.concatenate([right_KN, measured.repaired_KN], axis=1)
    return aucs(both, np.arange(both.shape[1]) < right_KN.shape[1], resamples, seed)


def _kind_row(measured: Measured, kind: str, circular: bool) -> dict[str, Any]:
    """Means of one kind of pair, and its AUC against all pairs of the other meaning."""
    chosen = np.array([pair.kind == kind for pair in measured.pairs])
    is_same = bool(measured.same[chosen][0])
    others = measured.same != is_same
    row: dict[str, Any] = {"kind": kind, "same_meaning": is_same, "n": int(chosen.sum())}
    row["overlap"] = float(measured.overlap[chosen].mean())
    for name, score_P in (("a", measured.a), ("b", measured.b)):
        sides = (score_P[chosen], score_P[others]) if is_same else (score_P[others], score_P[chosen])
        row[f"similarity_{name}"] = float(score_P[chosen].mean())
        row[f"auc_{name}"] = None if circular else auc(*sides)
    return row


def lists(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """The pairs to read: where the encoders differ most by rank, and the extremes of both sorts by their mean rank."""
    rank_a, rank_b = rank_shares(measured.a), rank_shares(measured.b)
    mean, gap = (rank_a + rank_b) / 2, rank_a - rank_b
    same = measured.same
    orders = {
        "most_different": np.argsort(-np.abs(gap), kind="stable"),
        "close_in_words_far_in_meaning": _within(np.argsort(mean, kind="stable"), ~same),
        "far_in_words_close_in_meaning": _within(np.argsort(-mean, kind="stable"), same),
    }
    return {
        name: [_listed(measured, int(i)) | {"rank_a": float(rank_a[i]), "rank_b": float(rank_b[i])} for i in order[:LISTED]]
        for name, order in orders.items()
    }


def _within(order: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    return order[chosen[order]]


def _listed(measured: Measured, index: int) -> dict[str, Any]:
    return asdict(measured.pairs[index]) | {
        "overlap": float(measured.overlap[index]),
        "similarity_a": float(measured.a[index]),
        "similarity_b": float(measured.b[index]),
    }


def as_csv(measured: Measured) -> str:
    rows = [_listed(measured, index) for index in range(len(measured.pairs))]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def auc_rows(result: dict[str, Any]) -> list[list[str]]:
    """Table rows of the AUCs and their intervals under A, B and words alone; none where no AUC was computed."""
    rows = []
    for name, label in (("auc", "AUC, same against different meaning"), ("auc_exchanged", "AUC, same against exchanged")):
        if isinstance(result[name], dict):
            columns = [result[name][column] for column in ("a", "b", "overlap")]
            rows.append([label, *(f"{column['value']:.3f}" for column in columns)])
            rows.append(["  95 % interval", *(f"{c['interval'][0]:.3f} to {c['interval'][1]:.3f}" for c in columns)])
    return rows


def kind_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["kind"],
            "same" if row["same_meaning"] else "different",
            str(row["n"]),
            *(f"{row[name]:.3f}" for name in ("overlap", "similarity_a", "similarity_b")),
            *("–" if row[name] is None else f"{row[name]:.3f}" for name in ("auc_a", "auc_b")),
        ]
        for row in rows
    ]
