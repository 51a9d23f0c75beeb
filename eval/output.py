"""What the commands of `lift-eval` share when they write: plain-text tables and percent figures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded with spaces; the first column left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(fraction: float | None, signed: bool = False) -> str:
    """0.6769 as `67.69`, or `+67.69` when signed; a dash for None."""
    if fraction is None:
        return "–"
    rounded = round(100 * fraction, 2) + 0.0  # no -0.00
    return f"{rounded:+.2f}" if signed else f"{rounded:.2f}"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A line for each row under the first row's keys; an interval becomes two numbers in one cell, None an empty one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in row.items()})
