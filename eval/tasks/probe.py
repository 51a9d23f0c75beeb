"""Classifiers on frozen image features: a linear probe and k nearest neighbours, trained on some images, measured on others.

Both see what the encoder compares with texts: the L2-normalised features behind its head, not the pooled features before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from eval.features import Features
from eval.settings import ProbeData
from eval.tasks import Scored, Task, TaskData
from eval.tasks.class_images import LabelledImages, read_class_images
from eval.tasks.class_ranking import ClassRanks, class_results, concatenated, rank_classes
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import sha256_text

TEMPERATURE = 0.07
"""Of a neighbour's vote, exp(cosine / temperature); DINO's (arXiv 2104.14294, appendix F.1)."""
HELD_OUT = 0.2
"""Part of each class's training images on which the strength is chosen."""
IMAGES_AT_A_TIME = 4096
"""Test images that the linear probe scores together."""
SIMILARITIES_AT_A_TIME = 2**25
"""Numbers in a block of similarities: 128 MiB."""


@dataclass
class Probe:
    """Training and test images; the labels of both are rows of `train.classes`."""

    train: LabelledImages
    test: LabelledImages
    settings: ProbeData


def read_probe(settings: ProbeData, allow_missing: bool) -> TaskData:
    """Raises UserError for what `read_class_images` does, fewer than two classes, test classes without training images."""
    train = read_class_images(given(settings.train, "probe.train"), settings.classes, allow_missing)
    test = read_class_images(given(settings.test, "probe.test"), settings.classes, allow_missing)
    trained = {train.classes[label] for label in train.label_N}
    if len(trained) < 2:
        raise UserError(f"{settings.train}: expected images of at least two classes, found only of '{next(iter(trained))}'.")
    tested = {test.classes[label] for label in test.label_N}
    if unknown := sorted(tested - trained):
        raise UserError(
            f"{settings.test}: expected the classes of {settings.train}, found '{unknown[0]}' without training images "
            f"({len(unknown)} such classes)."
        )
    train, test = _on_classes(train, sorted(trained)), _on_classes(test, sorted(trained), train)
    hashes = {image.content_hash for image in train.images}
    shared = sum(image.content_hash in hashes for image in test.images)
    unique = list({image.content_hash: image for image in train.images + test.images}.values())
    missing = [f"train/{name}" for name in train.missing] + [f"test/{name}" for name in test.missing]
    notes = {"train": train.notes, "test": test.notes, "test_images_also_in_train": shared}
    data_hash = sha256_text(f"{train.content_hash()} {test.content_hash()}")
    return TaskData(Probe(train, test, settings), unique, [], data_hash, missing, notes)


def _on_classes(data: LabelledImages, classes: list[str], names_of: LabelledImages | None = None) -> LabelledImages:
    """The same images with labels that are rows of `classes`."""
    names = dict(zip((names_of or data).classes, (names_of or data).names, strict=True))
    row = {identifier: number for number, identifier in enumerate(classes)}
    label_N = np.array([row[data.classes[label]] for label in data.label_N], np.int64)
    names_C = [names[identifier] for identifier in classes]
    return LabelledImages(classes, names_C, data.named, data.ids, data.images, label_N, data.missing, data.notes)


def score_knn(data: TaskData, features: Features) -> Scored:
    """Raises UserError when there are fewer training images than neighbours."""
    items: Probe = data.items
    count = items.settings.neighbours
    if count > len(items.train.images):
        raise UserError(f"--probe.neighbours: expected at most the {len(items.train.images)} training images, found {count}.")
    train_ND, test_MD = features.images(items.train.images, "train images"), features.images(items.test.images, "test images")
    blocks = knn_votes(train_ND, items.train.label_N, test_MD, count, len(items.train.classes))
    scored = class_results(items.test, _ranks(blocks, items.test.label_N))
    scored.details |= {"neighbours": count, "temperature": TEMPERATURE}
    return scored


def knn_votes(
    train_ND: np.ndarray, label_N: np.ndarray, test_MD: np.ndarray, neighbours: int, classes: int
) -> Iterator[np.ndarray]:
    """float64 [B, C], blocks of the M test images: the sum of exp(cosine / 0.07) over the neighbours of each class.

    Features are normalised. Of training images equally near at the last place, the first ones vote.
    """
    block = max(1, SIMILARITIES_AT_A_TIME // len(train_ND))
    for start in range(0, len(test_MD), block):
        similarity_BN = test_MD[start : start + block] @ train_ND.T
        last_B = np.partition(similarity_BN, len(train_ND) - neighbours, axis=1)[:, len(train_ND) - neighbours]
        votes_BC = np.zeros((len(similarity_BN), classes))
        for row, (similarity_N, last) in enumerate(zip(similarity_BN, last_B, strict=True)):
            candidates = np.flatnonzero(similarity_N >= last)
            nearest = candidates[np.argsort(-similarity_N[candidates], kind="stable")][:neighbours]
            weights = np.exp(similarity_N[nearest].astype(np.float64) / TEMPERATURE)
            votes_BC[row] = np.bincount(label_N[nearest], weights, classes)
        yield votes_BC


def _ranks(blocks: Iterable[np.ndarray], label_M: np.ndarray) -> ClassRanks:
    """Of blocks of class scores [B, C] that follow the order of the labels."""
    parts, start = [], 0
    for scores_BC in blocks:
        parts.append(rank_classes(scores_BC, label_M[start : start + len(scores_BC)]))
        start += len(scores_BC)
    return concatenated(parts)


def score_linear_probe(data: TaskData, features: Features) -> Scored:
    """`details` says which strength was taken, what each gave on the held-out part, and which fits did not converge.

    A strength at the edge of those tried is marked: a wider choice may be better.
    """
    items: Probe = data.items
    train_ND, test_MD = features.images(items.train.images, "train images"), features.images(items.test.images, "test images")
    model, report = fit_linear_probe(train_ND, items.train.label_N, items.settings)
    blocks = (
        class_logits(model, test_MD[start : start + IMAGES_AT_A_TIME]) for start in range(0, len(test_MD), IMAGES_AT_A_TIME)
    )
    scored = class_results(items.test, _ranks(blocks, items.test.label_N))
    scored.details |= {"linear_probe": report}
    return scored


def fit_linear_probe(
    feature_ND: np.ndarray, label_N: np.ndarray, settings: ProbeData
) -> tuple[LogisticRegression, dict[str, Any]]:
    """Logistic regression on all rows, with the strength that is best on a held-out part (of equal ones the smallest).

    Raises:
        UserError: several strengths, but no class with two images, so that nothing can be held out.
    """
    strengths = sorted(settings.strengths)
    held_out: list[dict[str, Any]] = []
    best = strengths[0]
    if len(strengths) > 1:
        held_N = stratified_part(label_N, HELD_OUT, settings.seed)
        if not held_N.any():
            raise UserError("--probe.train: expected a class with two images or more to choose a strength; give one strength.")
        for strength in strengths:
            model, converged = _fit(feature_ND[~held_N], label_N[~held_N], strength, settings.iterations)
            accuracy = float(np.mean(model.predict(feature_ND[held_N]) == label_N[held_N]))
            held_out.append({"strength": strength, "accuracy": accuracy, "converged": converged})
        best = max(held_out, key=lambda tried: (tried["accuracy"], -tried["strength"]))["strength"]
    model, converged = _fit(feature_ND, label_N, best, settings.iterations)
    report = {"strength": best, "converged": converged, "iterations": int(np.max(model.n_iter_)), "held_out": held_out}
    report["at_edge_of_strengths"] = len(strengths) > 1 and best in (strengths[0], strengths[-1])
    return model, report | {"not_converged": sum(not fit["converged"] for fit in held_out) + (not converged)}


def stratified_part(label_N: np.ndarray, part: float, seed: int) -> np.ndarray:
    """bool [N]: about `part` of each class, at least one image of a class that has two, and never all of one."""
    generator = np.random.default_rng(seed)
    held_N = np.zeros(len(label_N), bool)
    for label in np.unique(label_N):
        rows = generator.permutation(np.flatnonzero(label_N == label))
        count = min(max(1, round(part * len(rows))), len(rows) - 1)
        held_N[rows[:count]] = True
    return held_N


def _fit(feature_ND: np.ndarray, label_N: np.ndarray, strength: float, iterations: int) -> tuple[LogisticRegression, bool]:
    """The model and whether it converged."""
    model = LogisticRegression(C=strength, solver="lbfgs", max_iter=iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(feature_ND, label_N)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def class_logits(model: LogisticRegression, feature_ND: np.ndarray) -> np.ndarray:
    """[N, C]. For two classes scikit-learn keeps the difference alone."""
    logits = model.decision_function(feature_ND)
    return logits if logits.ndim == 2 else np.stack([np.zeros_like(logits), logits], axis=1)


LINEAR_PROBE = Task(read_probe, score_linear_probe, "probe")
KNN = Task(read_probe, score_knn, "probe")
