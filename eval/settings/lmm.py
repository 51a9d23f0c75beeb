"""Settings of what runs lmms-eval: `lift-eval data`, `lmm`, `stock`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lift.common.checks import at_least, given

LmmTaskName = Literal[
    "mmbench",
    "mmbench_cn",
    "gqa",
    "pope",
    "mme",
    "seedbench",
    "textvqa",
    "ai2d",
    "scienceqa",
    "scienceqa_img",
]
"""Benchmarks of `eval.lmm.tasks`."""


@dataclass
class DataSettings:
    """Turns a benchmark's published files into the data folder that lmms-eval finds without a network."""

    source: Path
    """Published file or folder, as docs/lmm_tasks.md lists them; for MMBench its TSV with base64 images."""
    task: LmmTaskName | None = None
    """Benchmark that `source` is of; a .tsv or .xlsx is taken for `mmbench` when nothing else is said."""
    out: Path | None = None
    """Folder for the data of any number of benchmarks, each added by its own call; `lift-eval lmm --data` takes it."""
    images: Path | None = None
    """Folder of the image files, where it is not in its published place beside the questions."""
    allow_missing: bool = False
    """Keep only the questions whose image files are there, and say how many were left out; else these are an error."""

    def __post_init__(self) -> None:
        given(self.out, "out")


@dataclass
class LmmSettings:
    """Runs lmms-eval's own tasks on a LLaVA folder and records every answer."""

    folder: Path
    """LLaVA folder that `LlavaForConditionalGeneration` and `AutoProcessor` load."""
    tasks: str | None = None
    """Benchmarks, separated by commas: mmbench, mmbench_cn, gqa, pope, mme, seedbench, textvqa, ai2d, scienceqa, scienceqa_img.
    May be left out where `data` is an MMBench file."""
    data: Path | None = None
    """Folder written by `lift-eval data`, or one MMBench TSV; left out, lmms-eval asks the hub."""
    out: Path | None = None
    """Folder for the run. Finished tasks of the same model, data and settings are reused, interrupted ones go on."""
    batch_size: int = 16
    """Questions answered at a time."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; left out, each task's own (16 for a letter, word or phrase)."""
    likelihood: bool | None = None
    """Score the option letters of multiple-choice questions by their probability, too; left out, wherever the model's tokenizer
    makes one token of a letter, and said where it does not."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is float32 on a CPU and the folder's own format on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        at_least(self, 1, "batch_size", "max_new_tokens", prefix="--")


@dataclass
class StockSettings:
    """Checks a run against lmms-eval's own `llava_hf` model: the same answers, row by row."""

    folder: Path
    """LLaVA folder that the run evaluated."""
    data: Path | None = None
    """Data folder or MMBench TSV that the run answered; left out, lmms-eval asks the hub."""
    against: Path | None = None
    """Run folder written by `lift-eval lmm` in float32."""
    tasks: str | None = None
    """Benchmarks of the run, separated by commas; left out, all that stock can answer."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        given(self.against, "against")
