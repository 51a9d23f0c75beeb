"""Benchmarks of the two encoders by themselves, beside the LMMs': folders of `lift-eval encoder` come in, rows go out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lift.common.errors import UserError
from lift.common.files import read_json


def compare_encoders(folder_a: Path | None, folder_b: Path | None) -> dict[str, Any] | None:
    """Both encoders' results, and under `rows` their metrics side by side; None when none were given.

    Raises:
        UserError: the two were measured on different data.
    """
    if folder_a is None or folder_b is None:
        return None
    a, b = (read_json(folder / "results.json", "results of lift-eval encoder") for folder in (folder_a, folder_b))
    if a["data_hash"] != b["data_hash"]:
        raise UserError(
            f"{folder_a} and {folder_b}: expected results on the same data, found different data hashes. Measure both again."
        )
    shares = [name for name, metric in a["metrics"].items() if metric["statistic"] != "median_rank" and name in b["metrics"]]
    rows = [{"name": name, "a": a["metrics"][name], "b": b["metrics"][name]} for name in shares]
    rows = [row | {"difference": row["a"]["value"] - row["b"]["value"]} for row in rows]
    return {"a": a, "b": b, "rows": rows}
