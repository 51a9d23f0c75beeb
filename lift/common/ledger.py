"""The drop ledger: every sample that cannot be used is counted by cause and named in `dropped.jsonl`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lift.common.errors import UserError
from lift.common.files import write_jsonl


class DropLedger:
    """Collects samples that a run cannot use; a sample counts once however often it is met (several epochs)."""

    def __init__(self) -> None:
        self._cause_by_key: dict[str, tuple[str, str]] = {}

    def drop(self, key: str, cause: str, detail: str = "") -> bool:
        """False when the sample is there already; its first cause stays."""
        new = key not in self._cause_by_key
        self._cause_by_key.setdefault(key, (cause, detail))
        return new

    def __len__(self) -> int:
        return len(self._cause_by_key)

    def rows(self) -> list[tuple[str, str, str]]:
        """(key, cause, detail), sorted by key."""
        return [(key, cause, detail) for key, (cause, detail) in sorted(self._cause_by_key.items())]

    def counts(self) -> dict[str, int]:
        return dict(Counter(cause for cause, _ in self._cause_by_key.values()).most_common())

    def write(self, path: Path) -> None:
        """One JSON object a line: `key`, `cause`, `detail`. An empty ledger writes an empty file: the run was looked at."""
        write_jsonl(path, ({"key": key, "cause": cause, "detail": detail} for key, cause, detail in self.rows()))

    def summary(self, total: int) -> str:
        if not self._cause_by_key:
            return f"dropped 0 of {total} samples"
        causes = ", ".join(f"{count} {cause}" for cause, count in self.counts().items())
        return f"dropped {len(self)} of {total} samples: {causes}"

    def check(self, total: int, max_drop_fraction: float, path: Path) -> None:
        """Raises UserError when more than `max_drop_fraction` of `total` samples was dropped; the ledger is written first."""
        self.write(path)
        self.require(total, max_drop_fraction, path)

    def require(self, total: int, max_drop_fraction: float, path: Path) -> None:
        """As `check`, in a process beside the one that writes the ledger to `path`."""
        if total == 0 or len(self) > max_drop_fraction * total:
            raise UserError(
                f"{self.summary(total)}, more than max_drop_fraction={max_drop_fraction:g} allows. {path} lists them; "
                "mend the data, or raise --max_drop_fraction if this is expected."
            )
