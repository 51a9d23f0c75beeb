"""Settings of what reads answers and runs: `lift-eval score`, `compare`, `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lift.common.checks import at_least, given

Format = Literal["auto", "records", "table", "llava_mmbench", "llava", "lmms_eval"]


@dataclass
class ScoreSettings:
    """Scores answers to a benchmark, ours or published: MMBench circular and vanilla, others by their own measures."""

    file: Path
    """Run folder of `lift-eval lmm` or its `records.jsonl`, MMBench or VLMEvalKit answers (.xlsx, .tsv with `prediction`), the
    original LLaVA's answers (.jsonl), or lmms-eval's samples (.jsonl)."""
    task: str | None = None
    """Benchmark (`mmbench`, `pope`, ...) where the file does not say it; of a run folder, the one to score."""
    questions: Path | None = None
    """The benchmark's questions, where the file lacks categories or right answers: MMBench TSV, published layout, or a folder
    of `lift-eval data`."""
    format: Format = "auto"
    """Form of the file; `auto` looks into it."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class CompareSettings:
    """Compares two encoders or two LMMs on the same items, per subtask, with paired statistics."""

    run_a: Path
    """Folder of `lift-eval encoder` or `lift-eval lmm`, or an answer file as for `lift-eval score`; differences are A - B."""
    run_b: Path
    """The same for the baseline."""
    more_a: list[Path] = field(default_factory=list)
    """Runs of model A from other training seeds, as in `--more_a [runs/lift_1,runs/lift_2]`; values are means over all of A."""
    more_b: list[Path] = field(default_factory=list)
    """The same for the baseline."""
    out: Path | None = None
    """Folder for the comparison."""
    name_a: str = "LIFT"
    """Name of the first model in tables."""
    name_b: str = "CLIP"
    """Name of the second model in tables."""
    task: str | None = None
    """Benchmark to compare; all that the runs share when not given. Of answer files, the one they are of."""
    questions: Path | None = None
    """The benchmark's questions, for answer files that lack categories or right answers."""
    format: Format = "auto"
    """Form of the answer files; `auto` looks into them."""
    adjust: Literal["holm", "bh"] = "holm"
    """p-values over the categories of a level: Holm (any false find) or Benjamini-Hochberg (share of false finds)."""
    resamples: int = 10_000
    """Bootstrap resamples of the clusters (circular groups, images)."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        at_least(self, 100, "resamples", prefix="--")
        if self.name_a == self.name_b:
            raise ValueError(f"--name_a and --name_b: expected two different names, found '{self.name_a}' twice.")


@dataclass
class ReportSettings(CompareSettings):
    """Compares two LMMs as `lift-eval compare` does, and shows it as one HTML page that needs no network."""

    out: Path | None = Path("report.html")
    """HTML file to write; `.json` and `.csv` of the same name hold the numbers."""
    encoder_a: Path | None = None
    """Folder written by `lift-eval encoder` for the encoder of run A."""
    encoder_b: Path | None = None
    """The same for run B."""
    training_a: list[Path] = field(default_factory=list)
    """Run folders of `lift pretrain`, `lmm train` or `lmm finetune` that made model A, for its loss curves and cost."""
    training_b: list[Path] = field(default_factory=list)
    """The same for the baseline."""
    stages: Path | None = None
    """JSON list of {"stage", "seconds", "peak_gb", "reused"} to show what the chain took."""
    flips: int | Literal["all"] = "all"
    """Questions that one model gets and the other misses on the page, spread over categories and directions; or `all`."""
    max_megabytes: float = 30.0
    """Largest HTML file. Flips that do not fit are left out, which the page says."""
    print_cards: int = 12
    """Flips in print."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flips != "all":
            at_least(self, 0, "flips", prefix="--")
        at_least(self, 0, "print_cards", prefix="--")
        if self.max_megabytes <= 0:
            raise ValueError(f"--max_megabytes: expected more than 0, found {self.max_megabytes}.")
        if given(self.out, "out").suffix != ".html":
            raise ValueError(f"--out: expected a file that ends in .html, found {self.out}.")
        if (self.encoder_a is None) != (self.encoder_b is None):
            raise ValueError("--encoder_a and --encoder_b: give both or neither.")
