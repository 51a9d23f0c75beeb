"""Sentence pairs from captions: captions come in, pairs close in words and pairs far in words go out, with what was counted.

Where images are known, they give the meaning: captions of one image mean the same, captions of different images do not, and the
encoders have no part in the choice. Where they are not known, the encoders' mean similarity gives it: such pairs are examples
to read, and say nothing about how well these encoders tell meanings apart. Memory is bounded by blocks and by stated caps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from eval.text.pairs import Caption, Pair, word_overlap, words

Encode = Callable[[list[str]], NDArray[np.float32]]
"""Sentences to L2-normalised float32 features [N, D]."""
BLOCK = 1024
"""Captions compared with all others at a time."""
POOL = 200_000
"""Candidate pairs held at a time; a uniform sample of all where there are more."""
PER_IMAGE = 200
"""Pairs of captions of one image looked at, at most."""
NEAREST = 5
"""Most similar captions of each that are looked at where the encoders give the meaning."""
WITHOUT_IMAGES = 5
"""All captions are encoded where images are not known: only one in so many of `max_captions` are looked at."""


@dataclass(frozen=True)
class Mined:
    pairs: list[Pair]
    counts: dict[str, Any]
    """What was looked at and found, for the record."""


@dataclass(frozen=True)
class Limits:
    high_overlap: float
    low_overlap: float
    max_pairs: int
    max_captions: int
    seed: int


def mine(captions: list[Caption], limits: Limits, encoders: list[Encode]) -> Mined:
    """Pairs of both sorts, at most `max_pairs` of each; `encoders` are used only where images are not known."""
    rng = np.random.default_rng(limits.seed)
    known = captions[0].image is not None
    distinct = list({(c.text.lower(), c.image): c for c in captions}.values())
    cap = limits.max_captions if known else max(2, limits.max_captions // WITHOUT_IMAGES)
    chosen = np.sort(rng.choice(len(distinct), cap, replace=False)) if len(distinct) > cap else np.arange(len(distinct))
    looked_at = [distinct[index] for index in chosen]
    find = _by_images if known else _by_encoders
    pairs, counts = find(looked_at, limits, encoders, rng)
    counts = {
        "captions": len(captions),
        "distinct": len(distinct),
        "looked_at": len(looked_at),
        "meaning_from": "images" if known else "encoders",
        **counts,
    }
    return Mined(pairs, counts)


def _by_images(
    captions: list[Caption], limits: Limits, encoders: list[Encode], rng: np.random.Generator
) -> tuple[list[Pair], dict[str, Any]]:
    images = np.unique([c.image or "" for c in captions], return_inverse=True)[1]
    close, found = close_in_words([words(c.text) for c in captions], limits.high_overlap, rng, images)
    close_PI = _sample(close, limits.max_pairs, rng)
    by_image: dict[str | None, list[int]] = {}
    for index, caption in enumerate(captions):
        by_image.setdefault(caption.image, []).append(index)
    far = [
        pair
        for group in by_image.values()
        for pair in _pairs_of(group, rng)
        if word_overlap(captions[pair[0]].text, captions[pair[1]].text) <= limits.low_overlap
    ]
    far_PI = _sample(np.array(far, np.int64).reshape(-1, 2), limits.max_pairs, rng)
    pairs = [Pair(captions[i].text, captions[j].text, False, "different images") for i, j in close_PI]
    pairs += [Pair(captions[i].text, captions[j].text, True, "same image") for i, j in far_PI]
    return pairs, {"close_in_words": found, "far_in_words": len(far)}


def _pairs_of(group: list[int], rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    size = 2 + int((2 * PER_IMAGE) ** 0.5)
    yield from combinations(group if len(group) <= size else sorted(rng.choice(group, size, replace=False)), 2)


def _by_encoders(
    captions: list[Caption], limits: Limits, encoders: list[Encode], rng: np.random.Generator
) -> tuple[list[Pair], dict[str, Any]]:
    texts = [c.text for c in captions]
    sets = [words(text) for text in texts]
    features = [encode(texts) for encode in encoders]
    scales = [_scale(feature_ND, rng) for feature_ND in features]

    def similarity(pairs_PI: NDArray[np.int64]) -> NDArray[np.float64]:
        first, second = pairs_PI[:, 0], pairs_PI[:, 1]
        each = [((f[first] * f[second]).sum(axis=1) - m) / s for f, (m, s) in zip(features, scales, strict=True)]
        return np.mean(each, axis=0)

    close_PI, found = close_in_words(sets, limits.high_overlap, rng)
    close_PI = close_PI[np.argsort(similarity(close_PI), kind="stable")[: limits.max_pairs]]
    near_PI = _nearest(features, scales)
    overlap_P = np.array([_jaccard(sets[i], sets[j]) for i, j in near_PI])
    far_PI = near_PI[overlap_P <= limits.low_overlap]
    far_PI = far_PI[np.argsort(-similarity(far_PI), kind="stable")]
    pairs = [Pair(texts[i], texts[j], False, "least similar") for i, j in close_PI]
    pairs += [Pair(texts[i], texts[j], True, "most similar") for i, j in far_PI[: limits.max_pairs]]
    return pairs, {"close_in_words": found, "far_in_words": len(far_PI)}


def _scale(feature_ND: NDArray[np.float32], rng: np.random.Generator) -> tuple[float, float]:
    """Mean and deviation of the similarity of random captions: encoders differ widely in both."""
    first, second = rng.integers(0, len(feature_ND), (2, 10_000))
    similarity = (feature_ND[first] * feature_ND[second]).sum(axis=1)[first != second]
    return float(similarity.mean()), float(similarity.std()) or 1.0


def _nearest(features: list[NDArray[np.float32]], scales: list[tuple[float, float]]) -> NDArray[np.int64]:
    """[P, 2] distinct pairs (i < j) of each caption with its nearest under the mean of the standardised similarities."""
    size = len(features[0])
    count = min(NEAREST, size - 1)
    pairs = []
    for start in range(0, size, BLOCK):
        rows = np.arange(start, min(start + BLOCK, size))
        total_BN = np.zeros((len(rows), size), np.float32)
        for feature_ND, (mean, deviation) in zip(features, scales, strict=True):
            total_BN += (feature_ND[rows] @ feature_ND.T - mean) / deviation
        total_BN[rows - start, rows] = -np.inf
        near_BK = np.argpartition(-total_BN, count - 1, axis=1)[:, :count]
        pairs.append(np.sort(np.stack([np.repeat(rows, count), near_BK.ravel()], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def close_in_words(
    sets: list[frozenset[str]], least: float, rng: np.random.Generator, images: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], int]:
    """Pairs (i < j) of sets with a Jaccard index of at least `least`, exactly, and of different `images` when given.

    Prefix filter of set-similarity joins (AllPairs, Bayardo et al. 2007): with words in order of rising frequency, two such
    sets share one of the first |x| - ceil(least |x|) + 1 words of each, so that only rare words are looked up.

    Returns:
        int64 [P, 2] in rising order, a uniform sample of at most POOL, and how many pairs there are in all.
    """
    vocabulary = {word for found in sets for word in found}
    frequency = dict.fromkeys(vocabulary, 0)
    for found in sets:
        for word in found:
            frequency[word] += 1
    rank = {word: number for number, word in enumerate(sorted(vocabulary, key=lambda word: (frequency[word], word)))}
    ordered = [sorted(rank[word] for word in found) for found in sets]
    whole = _incidence(ordered, len(rank))
    # less a little: ceil of 0.6 * 5 = 3.0000000000000004 would be 4
    prefixes = [ids[: len(ids) - int(np.ceil(least * len(ids) - 1e-9)) + 1] for ids in ordered]
    prefix = _incidence(prefixes, len(rank))
    sizes = np.array([len(ids) for ids in ordered])
    pool, priority, count = np.empty((0, 2), np.int64), np.empty(0), 0
    for start in range(0, len(sets), BLOCK):
        candidates = (prefix[start : start + BLOCK] @ prefix.T).tocoo()
        first, second = candidates.row.astype(np.int64) + start, candidates.col.astype(np.int64)
        kept = first < second
        if images is not None:
            kept &= images[first] != images[second]
        first, second = first[kept], second[kept]
        # a pair whose sizes alone rule the overlap out needs no count
        fits = np.minimum(sizes[first], sizes[second]) >= least * np.maximum(sizes[first], sizes[second]) - 1e-9
        pairs_PI = _at_least(whole, sizes, np.stack([first[fits], second[fits]], axis=1), least)
        count += len(pairs_PI)
        pool, priority = np.concatenate([pool, pairs_PI]), np.concatenate([priority, rng.random(len(pairs_PI))])
        if len(pool) > POOL:  # those with the smallest random numbers are a uniform sample
            chosen = np.argpartition(priority, POOL)[:POOL]
            pool, priority = pool[chosen], priority[chosen]
    return pool[np.lexsort((pool[:, 1], pool[:, 0]))], count


def _at_least(whole: Any, sizes: NDArray[np.int64], pairs_PI: NDArray[np.int64], least: float) -> NDArray[np.int64]:
    kept = []
    for start in range(0, len(pairs_PI), 100_000):
        first, second = pairs_PI[start : start + 100_000].T
        common = np.asarray(whole[first].multiply(whole[second]).sum(axis=1)).ravel()
        kept.append(common >= least * (sizes[first] + sizes[second] - common) - 1e-9)
    return pairs_PI[np.concatenate(kept)] if kept else pairs_PI


def _incidence(rows: list[list[int]], columns: int) -> Any:
    """Sparse int32 matrix with a one for each word of each set."""
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    indices = np.array([index for row in rows for index in row], np.int32)
    return sparse.csr_array((np.ones(len(indices), np.int32), indices, starts), shape=(len(rows), columns))


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)


def _sample(pairs_PI: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    if len(pairs_PI) <= most:
        return pairs_PI
    return pairs_PI[np.sort(rng.choice(len(pairs_PI), most, replace=False))]
