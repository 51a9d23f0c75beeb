"""How often the 95 % intervals of `lift-eval compare` hold the true difference, and how often its p-values err (no speed).

    python benchmarks/coverage_study.py [--repeats 2000] [--resamples 1000] [--out coverage.json]

Answers of two models are drawn with a known true difference. Clusters (images) have a difficulty that both models share and a
side that they lean to, so that their rows are right or wrong together. Printed are the share of intervals that hold the truth
(95 % wanted) and, where the difference is 0, the shares of p-values of at most 0.05 and 0.5 (no more than that wanted).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.comparison.seeds import hierarchical_result
from eval.comparison.statistics import PairedResult, Terms, detectable_difference, paired_result, sign_flip_p_value
from eval.output import format_table, percent

BASE = 0.55


def study_clusters(
    clusters: int, size: int, difference: float, repeats: int, resamples: int, seed: int = 0, ignore_clusters: bool = False
) -> dict[str, float]:
    """Accuracy on `clusters` images with `size` rows each."""
    rng, results = np.random.default_rng(seed), []
    cluster_U = np.repeat(np.arange(clusters), size)
    for _ in range(repeats):
        hard_C, side_C = rng.uniform(-0.1, 0.1, clusters), rng.choice([-0.25, 0.25], clusters)
        chances = (BASE + sign * (difference / 2 + side_C) + hard_C for sign in (1, -1))
        a, b = ([_accuracy(rng.random(len(cluster_U)) < chance_C[cluster_U])] for chance_C in chances)
        drawn_from = np.arange(len(cluster_U)) if ignore_clusters else cluster_U
        results.append(paired_result(a, b, drawn_from, resamples, int(rng.integers(1 << 31))))
    return _shares(results, difference)


def study_alike(units: int, discordance: float, repeats: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """Two models of one accuracy that answer alike but on a share of the questions: the hardest case for a bootstrap."""
    rng, results = np.random.default_rng(seed), []
    for _ in range(repeats):
        side_U = rng.choice([1.0, -1.0, 0.0], units, p=[discordance / 2, discordance / 2, 1 - discordance])
        a, b = [_accuracy(side_U > 0)], [_accuracy(side_U < 0)]
        results.append(paired_result(a, b, np.arange(units), resamples, int(rng.integers(1 << 31))))
    return _shares(results, 0.0)


def study_f1(clusters: int, size: int, difference: float, repeats: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """F1 of the answer yes on images with `size` questions, half of them true; `difference` is that of the F1 scores."""
    rng, results = np.random.default_rng(seed), []
    cluster_U = np.repeat(np.arange(clusters), size)
    true_U = np.arange(len(cluster_U)) % 2 == 0
    for _ in range(repeats):
        side_C = rng.choice([-0.15, 0.15], clusters)
        runs = []
        for sign in (1, -1):
            # with half true F1 = 2 recall / (recall + false yes + 1): the recall for an F1 of 0.7 +- difference / 2
            wanted, false_yes = 0.7 + sign * difference / 2, 0.3
            recall = wanted * (1 + false_yes) / (2 - wanted)
            chance_U = np.where(true_U, recall, false_yes) + np.where(true_U, 1, -1) * sign * side_C[cluster_U]
            said_U = rng.random(len(cluster_U)) < chance_U
            runs.append([Terms((2.0 * (said_U & true_U))[:, None], (1.0 * said_U + true_U)[:, None])])
        results.append(paired_result(runs[0], runs[1], cluster_U, resamples, int(rng.integers(1 << 31))))
    return _shares(results, difference)


def study_seeds(
    runs: int, questions: int, deviation: float, difference: float, repeats: int, seed: int = 0
) -> dict[str, float]:
    """`runs` training runs a side whose accuracies lie about their model's with a standard deviation of `deviation`."""
    rng, results = np.random.default_rng(seed), []
    for _ in range(repeats):
        hard_Q = rng.uniform(-0.2, 0.2, questions)
        a, b = (
            [
                _accuracy(rng.random(questions) < BASE + sign * difference / 2 + rng.normal(0, deviation) + hard_Q)
                for _ in range(runs)
            ]
            for sign in (1, -1)
        )
        results.append(hierarchical_result(a, b, np.arange(questions))[0])
    return _shares(results, difference)


def study_power(units: int, discordance: float, repeats: int, seed: int = 0) -> dict[str, float]:
    """How often the difference that is called detectable is found, with as many discordant units as expected observed."""
    rng = np.random.default_rng(seed)
    observed = np.zeros(units)
    observed[: round(units * discordance)] = 1
    detectable = detectable_difference(observed, units)
    if detectable is None:
        return {"detectable": float("nan"), "found": float("nan")}
    share = max(detectable, discordance)
    chances = [(share + detectable) / 2, (share - detectable) / 2, 1 - share]
    found = [sign_flip_p_value(rng.choice([1.0, -1.0, 0.0], units, p=chances)) <= 0.05 for _ in range(repeats)]
    return {"detectable": detectable, "found": float(np.mean(found))}


def _accuracy(right_U: np.ndarray) -> Terms:
    top_US = right_U.astype(np.float64)[:, None]
    return Terms(top_US, np.ones_like(top_US))


def _shares(results: list[PairedResult], difference: float) -> dict[str, float]:
    """Samples in which no cluster differs have no interval; they are counted apart."""
    ends = [result.interval for result in results if result.interval is not None]
    p_values = np.array([result.p_value for result in results])
    return {
        "coverage": float(np.mean([low - 1e-12 <= difference <= high + 1e-12 for low, high in ends])),
        "without": 1 - len(ends) / len(results),
        "rejected": float(np.mean(p_values <= 0.05)),
        "p_below_half": float(np.mean(p_values <= 0.5)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    repeats, resamples = arguments.repeats, arguments.resamples
    found: list[dict[str, Any]] = []
    for clusters, size in ((10, 1), (20, 1), (50, 1), (200, 1), (1000, 1), (20, 6), (50, 6), (200, 6)):
        for difference in (0.0, 0.05, 0.2):
            values = study_clusters(clusters, size, difference, repeats, resamples)
            found.append({"study": f"accuracy, {clusters} clusters of {size}", "difference": difference} | values)
    for units in (20, 50, 200):
        for discordance in (0.02, 0.05, 0.1):
            values = study_alike(units, discordance, repeats, resamples)
            found.append({"study": f"{units} units, {discordance:.0%} discordant", "difference": 0.0} | values)
    for clusters, size, difference in ((50, 6, 0.0), (50, 6, 0.05), (200, 6, 0.0), (200, 6, 0.05)):
        values = study_f1(clusters, size, difference, repeats, resamples)
        found.append({"study": f"F1, {clusters} clusters of {size}", "difference": difference} | values)
    for runs in (2, 3, 5):
        for deviation in (0.0, 0.02, 0.05):
            for difference in (0.0, 0.05):
                values = study_seeds(runs, 300, deviation, difference, repeats)
                name = f"{runs} seeds of deviation {100 * deviation:g} points, 300 questions"
                found.append({"study": name, "difference": difference} | values)
    found += [
        {"study": f"power, {units} units, {discordance:.0%} discordant"} | study_power(units, discordance, repeats)
        for units in (20, 50, 200, 1176)
        for discordance in (0.1, 0.3)
    ]
    studies = [row for row in found if "coverage" in row]
    cells = [
        (
            row["study"],
            percent(row["difference"]),
            *(percent(row[name]) for name in ("coverage", "without")),
            *(percent(row[name]) if row["difference"] == 0 else "" for name in ("rejected", "p_below_half")),
        )
        for row in studies
    ]
    print(f"{repeats} repeats, {resamples} resamples, all in %")
    print(format_table(["study", "difference", "interval holds it", "no interval", "p <= 0.05", "p <= 0.5"], cells))
    powers = [(row["study"], percent(row["detectable"]), percent(row["found"])) for row in found if "found" in row]
    print(format_table(["study", "detectable", "found"], powers))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
