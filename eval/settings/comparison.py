"""Settings of what reads answers and runs: `lift-eval score`, `compare`, `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    """Shows two runs of `lift-eval lmm` as one HTML page that needs no network, with its numbers as JSON and CSV beside it."""

    run_a: Path
    """Run folder written by `lift-eval lmm`; differences are A - B."""
    run_b: Path
    """Run folder of the baseline."""
    out: Path = Path("report.html")
    """HTML file to write; `.json` and `.csv` of the same name hold the numbers."""
    name_a: str = "LIFT"
    """Name of the first run on the page."""
    name_b: str = "CLIP"
    """Name of the second run on the page."""
    encoder_a: Path | None = None
    """Folder written by `lift-eval encoder` for the encoder of run A."""
    encoder_b: Path | None = None
    """The same for run B."""
    training_a: list[Path] = field(default_factory=list)
    """Run folders of `lift pretrain`, `lmm train` or `lmm finetune` that made run A's model, for its curves and cost."""
    training_b: list[Path] = field(default_factory=list)
    """The same for run B."""
    stages: Path | None = None
    """JSON list of {"stage", "seconds", "peak_gb", "reused"} to show what the chain took."""
    flips: int | Literal["all"] = "all"
    """Questions that one model gets and the other misses on the page, spread over categories and directions; or `all`."""
    max_megabytes: float = 30.0
    """Largest HTML file. Flips that do not fit are left out, which the page says."""
    print_cards: int = 12
    """Flips in print."""
    resamples: int = 10_000
    """Bootstrap resamples of the question groups."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if self.flips != "all":
            at_least(self.flips, 0, "flips")
        at_least(self.print_cards, 0, "print_cards")
        at_least(self.resamples, 100, "resamples")
        if self.max_megabytes <= 0:
            raise ValueError(f"--max_megabytes: expected more than 0, found {self.max_megabytes}.")
        if self.out.suffix != ".html":
            raise ValueError(f"--out: expected a file that ends in .html, found {self.out}.")
        if (self.encoder_a is None) != (self.encoder_b is None):
            raise ValueError("--encoder_a and --encoder_b: give both or neither.")
        if self.name_a == self.name_b:
            raise ValueError(f"--name_a and --name_b: expected two different names, found '{self.name_a}' twice.")
