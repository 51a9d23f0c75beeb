"""Benchmarks of the two encoders by themselves, beside the LMMs': folders of `lift-eval encoder` come in, rows go out."""

from __future__ import annotations

import dataclasses
from typing import Any

from eval.compare_encoders import encoder_comparison
from eval.report.tables import SIGNIFICANT, without_nan
from eval.settings import CompareSettings, ReportSettings


def encoders_of(settings: ReportSettings) -> dict[str, Any] | None:
    """The comparison of both encoders as `lift-eval compare` makes it, each row with `ahead`; None when none were given.

    Raises:
        UserError: the two were measured on other data, or by another protocol.
    """
    if settings.encoder_a is None or settings.encoder_b is None:
        return None
    shared = ("out", "name_a", "name_b", "resamples", "seed")
    options = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(CompareSettings) if field.name in shared
    }
    found = encoder_comparison(CompareSettings(run_a=settings.encoder_a, run_b=settings.encoder_b, **options))
    comparison: dict[str, Any] = without_nan(found)
    comparison["rows"] = [row | {"ahead": _ahead(row)} for row in comparison["rows"]]
    return comparison


def _ahead(row: dict[str, Any]) -> str:
    """A low rank is the better one. By the adjusted p-value; what has none is told by its interval."""
    interval, p = row["interval"], row["p_holm"]
    told = p < SIGNIFICANT if p is not None else interval is not None and (interval[0] > 0 or interval[1] < 0)
    if not told or not row["difference"]:
        return "neither"
    return "a" if (row["difference"] > 0) != (row["statistic"] == "median_rank") else "b"
