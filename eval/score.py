"""Table of the scores that `lift-eval lmm` writes into run.json, until it writes `eval.records`."""

from __future__ import annotations

from typing import Any

from eval.output import format_table, percent


def score_table(scores: dict[str, Any]) -> str:
    """The result of `mmbench.score_records` as text, accuracies in percent."""
    named = [("overall", scores["overall"])]
    named += [(f"{level.upper()} {name}", values) for level in ("l1", "l2", "l3") for name, values in scores[level].items()]
    rows = [
        (name, v["groups"], v["rows"], percent(v["circular"]), percent(v["vanilla"]), percent(v["parse_failure_rate"]))
        for name, v in named
    ]
    return format_table(["MMBench", "groups", "rows", "circular %", "first pass %", "unparsed %"], rows)
