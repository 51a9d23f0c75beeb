"""What is read of a benchmark's published files, before it is written; and the checks that all layouts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.lmm.tasks.dataset import Table


@dataclass(frozen=True)
class Published:
    tables: Sequence[Table]
    """The questions' table first; all of one repository."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> number of published questions that are in no table."""
