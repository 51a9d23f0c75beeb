"""Linear probe and k-NN on frozen features: brute force, separable features, strengths, fits cut short, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import ColourEncoder, colour_image, write_images
from sklearn.linear_model import LogisticRegression

from eval.features import Features, normalised
from eval.measures import measured, records_table
from eval.settings import ProbeData
from eval.tasks import Scored, load_task
from eval.tasks.class_ranking import rank_classes
from eval.tasks.probe import class_logits, fit_linear_probe, knn_votes, stratified_part
from lift.common.errors import UserError

COLOURS = {"blue": (0, 0, 1), "green": (0, 1, 0), "red": (1, 0, 0)}


def colour_set(folder: Path, seed: int, images: int, classes: dict[str, Any] = COLOURS) -> Path:
    """Bright colours with up to a third of the others: separable."""
    generator = np.random.default_rng(seed)
    files = {}
    for name, direction in classes.items():
        for number in range(images):
            rgb = np.array(direction) * 200 + generator.integers(0, 55, 3)
            files[f"{name}/{number}.png"] = colour_image(tuple(int(value) for value in rgb))
    return write_images(folder, files)


@pytest.fixture
def settings(tmp_path: Path) -> ProbeData:
    return ProbeData(colour_set(tmp_path / "train", 0, 10), colour_set(tmp_path / "test", 1, 4), neighbours=5)


def score(task: str, settings: ProbeData) -> tuple[Scored, dict[str, Any]]:
    chosen = load_task(task)
    scored = chosen.score(chosen.read(settings, False), Features(ColourEncoder()))  # type: ignore[arg-type]
    table = records_table(task, scored.records)
    return scored, {measure.name: measured(table, measure)["value"] for measure in scored.measures}


@pytest.mark.parametrize("task", ["linear_probe", "knn"])
def test_separable_classes_are_all_right(task: str, settings: ProbeData) -> None:
    scored, values = score(task, settings)
    assert values == {"top1": 1.0, "mean_per_class": 1.0}
    assert len(scored.records) == 12 and scored.details["confusions"] == []
    assert scored.details["per_class"] == {name: {"n": 4, "top1": 1.0} for name in COLOURS}


def test_a_mislabelled_image_is_a_confusion(settings: ProbeData) -> None:
    assert settings.test is not None
    write_images(settings.test, {"green/odd.png": colour_image((250, 3, 3))})
    for task in ("linear_probe", "knn"):
        scored, values = score(task, settings)
        assert scored.details["confusions"] == [("green", "red", 1)]
        assert values["top1"] == pytest.approx(12 / 13) and values["mean_per_class"] == pytest.approx((1 + 4 / 5 + 1) / 3)


def test_votes_by_hand() -> None:
    """Cosines 1, 0.8, 0.6 and 0 with the training images of classes 0, 1, 1, 2; the three nearest vote."""
    train = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    (votes,) = knn_votes(train, np.array([0, 1, 1, 2]), np.array([[1, 0]], np.float32), 3, 4)
    assert votes[0] == pytest.approx([np.exp(1 / 0.07), np.exp(0.8 / 0.07) + np.exp(0.6 / 0.07), 0, 0], rel=1e-4)


def test_votes_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.tasks.probe.SIMILARITIES_AT_A_TIME", 500 * 7)
    generator = np.random.default_rng(0)
    train, test = (normalised(generator.standard_normal((n, 6)).astype(np.float32)) for n in (500, 60))
    label = generator.integers(0, 9, 500)
    blocks = list(knn_votes(train, label, test, 20, 9))
    assert [len(block) for block in blocks] == [7] * 8 + [4]
    expected = np.zeros((60, 9))
    for row, image in enumerate(test.astype(np.float64)):
        cosine = [float(image @ other) for other in train.astype(np.float64)]
        for neighbour in sorted(range(500), key=lambda n: -cosine[n])[:20]:
            expected[row, label[neighbour]] += np.exp(cosine[neighbour] / 0.07)
    assert np.concatenate(blocks) == pytest.approx(expected, rel=1e-4)


def test_of_equally_near_images_the_first_vote() -> None:
    train = np.tile(np.array([[1, 0]], np.float32), (6, 1))
    (votes,) = knn_votes(train, np.array([2, 1, 0, 0, 0, 0]), train[:1], 2, 3)
    assert votes[0] == pytest.approx([0, np.exp(1 / 0.07), np.exp(1 / 0.07)], rel=1e-5)


def noisy_features(images: int = 240, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    label_N = generator.integers(0, classes, images)
    centre_CD = generator.standard_normal((classes, 12))
    return normalised((centre_CD[label_N] + 1.5 * generator.standard_normal((images, 12))).astype(np.float32)), label_N


def test_the_strength_is_the_best_on_the_held_out_part() -> None:
    feature_ND, label_N = noisy_features()
    model, report = fit_linear_probe(feature_ND, label_N, ProbeData(strengths=(10.0, 1e-4, 1.0)))
    held_N = stratified_part(label_N, 0.2, 0)
    expected = {}
    for strength in (1e-4, 1.0, 10.0):
        alone = LogisticRegression(C=strength, max_iter=5000).fit(feature_ND[~held_N], label_N[~held_N])
        expected[strength] = float(np.mean(alone.predict(feature_ND[held_N]) == label_N[held_N]))
    assert {row["strength"]: row["accuracy"] for row in report["held_out"]} == expected
    best = max(expected.values())
    assert report["strength"] == min(strength for strength, accuracy in expected.items() if accuracy == best)
    again = LogisticRegression(C=report["strength"], max_iter=5000).fit(feature_ND, label_N)
    assert np.array_equal(model.coef_, again.coef_)
    assert report["converged"] and report["not_converged"] == 0
    assert report["at_edge_of_strengths"] == (report["strength"] != 1.0)


def test_a_fit_that_stops_early_is_reported() -> None:
    feature_ND, label_N = noisy_features()
    _, report = fit_linear_probe(feature_ND, label_N, ProbeData(strengths=(1.0, 100.0), iterations=1))
    assert report["not_converged"] == 3 and not report["converged"] and report["iterations"] == 1


@pytest.mark.parametrize("classes", [2, 4])
def test_logits_rank_as_scikit_learn_predicts(classes: int) -> None:
    feature_ND, label_N = noisy_features(classes=classes)
    model, report = fit_linear_probe(feature_ND, label_N, ProbeData(strengths=(1.0,)))
    logits_NC = class_logits(model, feature_ND)
    assert logits_NC.shape == (240, classes) and report["held_out"] == []
    assert np.array_equal(rank_classes(logits_NC, label_N).rank_N == 0, model.predict(feature_ND) == label_N)


def test_a_fifth_of_each_class_is_held_out() -> None:
    label_N = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    held_N = stratified_part(label_N, 0.2, seed=0)
    assert np.bincount(label_N[held_N], minlength=4).tolist() == [10, 2, 1, 0]
    assert np.array_equal(held_N, stratified_part(label_N, 0.2, seed=0))
    assert not np.array_equal(held_N, stratified_part(label_N, 0.2, seed=1))


def test_images_in_both_sets_are_counted(settings: ProbeData) -> None:
    assert settings.train is not None and settings.test is not None
    (settings.test / "red/again.png").write_bytes((settings.train / "red/0.png").read_bytes())
    assert load_task("knn").read(settings, False).notes["test_images_also_in_train"] == 1


def test_test_images_of_some_classes_keep_the_training_labels(settings: ProbeData, tmp_path: Path) -> None:
    settings.test = colour_set(tmp_path / "some", 2, 3, {"red": (1, 0, 0)})
    scored, values = score("knn", settings)
    assert values["top1"] == 1.0 and {record.subtask for record in scored.records} == {"red"}


def test_bad_input(settings: ProbeData, tmp_path: Path) -> None:
    read = load_task("knn").read
    with pytest.raises(UserError, match="expected at most the 30 training images, found 31"):
        score("knn", ProbeData(settings.train, settings.test, neighbours=31))
    with pytest.raises(UserError, match="found 'pink' without training images"):
        read(ProbeData(settings.train, colour_set(tmp_path / "p", 0, 1, {"pink": (1, 0, 1)})), False)
    with pytest.raises(UserError, match="at least two classes, found only of 'red'"):
        read(ProbeData(colour_set(tmp_path / "r", 0, 3, {"red": (1, 0, 0)}), settings.test), False)
    with pytest.raises(UserError, match=r"--probe\.train is required"):
        read(ProbeData(), False)
    with pytest.raises(UserError, match="a class with two images or more"):
        score("linear_probe", ProbeData(colour_set(tmp_path / "one", 0, 1), settings.test))
    for wrong in ({"strengths": (1.0, -1.0)}, {"strengths": ()}, {"neighbours": 0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="--probe"):
            ProbeData(**wrong)
