"""The LIFT paper's reading of its MMBench gains, tested on two runs: L2 rows of a comparison come in, a verdict goes out.

The reading (arXiv 2506.04209): *gains come from fine-grained perception (single-instance) and relation reasoning*. It says two
things: A gains in both of these L2 categories, and it gains there more than in the other four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.comparison.statistics import adjusted
from eval.report.names import plain

NAMED = ("finegrained_perception (instance-level)", "relation_reasoning")
SIGNIFICANT = 0.05
POWER_FACTOR = 2.8
"""1.96 + 0.84: a difference of so many standard errors is found at 5 % with a power of 80 %."""


def paper_readings(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each of MMBench's languages that was compared; see `paper_reading`."""
    tasks = [task for task in ("mmbench", "mmbench_cn") if task in comparison["tasks"]]
    return [paper_reading(comparison, task) for task in tasks]


def paper_reading(comparison: dict[str, Any], task: str) -> dict[str, Any]:
    """The verdict, a sentence, and its evidence in fractions.

    - `supported`: A is ahead in both named categories (p-value of the paired test, Holm over these two, 5 %), and by more than
      in the other categories together (the interval of the contrast lies above 0).
    - `not supported`: A is behind in a named category by that test, or the contrast's interval lies below 0.
    - `undecided`: neither; `detectable` says what this many groups would have shown.
    - `not testable`: one of the categories, or all others, are not among the questions.
    """
    rows = [row for row in comparison["rows"] if row["task"] == task and row["level"] == "l2" and row["primary"]]
    by_name = {row["name"]: row for row in rows}
    others = [row for row in rows if row["name"] not in NAMED]
    missing = [name for name in NAMED if name not in by_name]
    if missing or not others:
        what = plain(" and ".join(missing)) if missing else "other L2 categories"
        return {
            "task": task,
            "verdict": "not testable",
            "sentence": f"These questions have no {what}.",
            "rows": [],
            "contrast": None,
        }
    named = [by_name[name] for name in NAMED]
    resamples, seed = comparison["bootstrap"]["resamples"], comparison["bootstrap"]["seed"]
    generator = np.random.default_rng(seed)
    draws = [_pooled_draws(part, comparison["seeds"] is not None, resamples, generator) for part in (named, others)]
    evidence = [*(_evidence(row["name"], [row]) for row in named), _evidence("both together", named)]
    evidence.append(_evidence("the other L2 categories", others))
    for row, drawn in zip(evidence[2:], draws, strict=True):
        row["interval"] = _interval(drawn)
    for row, p in zip(evidence, adjusted([row["p_value"] for row in named], "holm"), strict=False):
        row["p_adjusted"] = p
    contrast = _contrast(evidence[2]["difference"] - evidence[3]["difference"], draws[0] - draws[1])
    verdict = _verdict(evidence[:2], contrast)
    return {
        "task": task,
        "verdict": verdict,
        "sentence": _sentence(verdict, evidence, contrast, comparison["name_a"]),
        "rows": evidence,
        "contrast": contrast,
    }


def _pooled_draws(
    rows: Sequence[dict[str, Any]], several_runs: bool, resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """float64 [resamples]: the pooled difference of as many groups, drawn with replacement within each category.

    A group is right for A alone, for B alone, or for both or neither, so that drawing groups is drawing these three counts.
    Of several runs a side there are means instead: each category's difference is then drawn from the normal distribution that
    its interval says, as if categories shared no seed.
    """
    total = np.zeros(resamples)
    for row in rows:
        if several_runs:
            low, high = row["interval"] or (row["difference"], row["difference"])
            total += row["n"] * generator.normal(row["difference"], (high - low) / 3.92, resamples)
            continue
        shares = np.array([row["only_a"], row["only_b"], row["n"] - row["only_a"] - row["only_b"]]) / row["n"]
        counts_R3 = generator.multinomial(row["n"], shares, size=resamples)
        total += counts_R3[:, 0] - counts_R3[:, 1]
    return total / sum(row["n"] for row in rows)


def _evidence(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A category as the comparison has it, or several pooled: by their questions, without a test."""
    if len(rows) == 1:
        kept = ("n", "difference", "interval", "only_a", "only_b", "p_value", "detectable")
        return {"name": name, "p_adjusted": None} | {key: rows[0][key] for key in kept}
    n, only_a, only_b = (sum(row[key] for row in rows) for key in ("n", "only_a", "only_b"))
    difference = sum(row["n"] * row["difference"] for row in rows) / n
    evidence = {"name": name, "n": n, "difference": difference, "only_a": only_a, "only_b": only_b}
    return evidence | dict.fromkeys(("interval", "p_value", "p_adjusted", "detectable"))


def _interval(drawn: NDArray[np.float64]) -> list[float] | None:
    """None where no draw differs from another: as in the comparison, that shows no spread and no certainty."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [float(low), float(high)] if np.ptp(drawn) else None


def _contrast(difference: float, drawn: NDArray[np.float64]) -> dict[str, Any]:
    spread = float(np.std(drawn))
    return {"difference": difference, "interval": _interval(drawn), "detectable": POWER_FACTOR * spread if spread else None}


def _verdict(named: Sequence[dict[str, Any]], contrast: dict[str, Any]) -> str:
    clear = [row["p_adjusted"] is not None and row["p_adjusted"] < SIGNIFICANT for row in named]
    low, high = contrast["interval"] or (0.0, 0.0)
    if high < 0 or any(is_clear and row["difference"] < 0 for is_clear, row in zip(clear, named, strict=True)):
        return "not supported"
    return "supported" if low > 0 and all(clear) else "undecided"


def _sentence(verdict: str, evidence: Sequence[dict[str, Any]], contrast: dict[str, Any], name_a: str) -> str:
    points = [_points(row["difference"]) for row in evidence]
    interval = "no interval: no draw of these questions differs from another"
    if contrast["interval"] is not None:
        interval = "95 % interval {} to {}".format(*map(_points, contrast["interval"]))
    text = (
        f"{name_a} gains {points[0]} points in single-instance fine-grained perception and {points[1]} in relation reasoning; "
        f"both together {points[2]}, the other L2 categories {points[3]}: a contrast of {_points(contrast['difference'])} "
        f"({interval})."
    )
    if verdict == "undecided" and contrast["detectable"] is not None:
        text += (
            f" This many questions would have shown a contrast of {100 * contrast['detectable']:.1f} points with 80 % power."
        )
    return text


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}".replace("-", "−")
