"""Settings of what reads answers and runs: `lift-eval score`, `compare`, `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.settings.common import at_least, given


@dataclass
class ScoreSettings:
    """Scores answers by MMBench's rules: circular and first-pass accuracy, parse failures."""

    file: Path
    """`records.jsonl` of a run, or an answer file in MMBench's form (.tsv, .xlsx) with a `prediction` column."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass
class CompareSettings:
    """Compares two encoders or two LMMs on the same items, per subtask, with paired statistics."""

    run_a: Path
    """Folder written by `lift-eval encoder` or by `lift-eval lmm`; differences are A - B."""
    run_b: Path
    """Run folder of the baseline."""
    out: Path | None = None
    """Folder for the comparison."""
    name_a: str = "LIFT"
    """Name of the first run in tables."""
    name_b: str = "CLIP"
    """Name of the second run in tables."""
    resamples: int = 10_000
    """Bootstrap resamples of the question groups."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        at_least(self.resamples, 100, "resamples")
        if self.name_a == self.name_b:
            raise ValueError(f"--name_a and --name_b: expected two different names, found '{self.name_a}' twice.")


@dataclass
class ReportSettings:
    """Writes a comparison as one HTML page that needs no network."""

    comparison: Path
    """Folder written by `lift-eval compare`."""
    out: Path = Path("report.html")
    """HTML file to write."""
    encoder_a: Path | None = None
    """Folder written by `lift-eval encoder` for the encoder of run A."""
    encoder_b: Path | None = None
    """The same for run B."""
    stages: Path | None = None
    """JSON list of {"stage", "seconds", "peak_gb", "reused"} to show what the chain took."""
    flips: int = 6
    """Questions shown that one model gets and the other misses."""

    def __post_init__(self) -> None:
        at_least(self.flips, 0, "flips")
        if (self.encoder_a is None) != (self.encoder_b is None):
            raise ValueError("--encoder_a and --encoder_b: give both or neither.")
