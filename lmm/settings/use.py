"""Settings of the commands that answer with a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lift.common.checks import at_least, share


@dataclass
class _Answering:
    """What every command that answers with a LLaVA model is told."""

    model: Path
    """LLaVA folder, as `lmm train` writes it."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    seed: int = 0
    """Seed of what is drawn."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is float32 on a CPU and the folder's own format on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "temperature")


@dataclass
class GenerateSettings(_Answering):
    """Answers a file of questions in batches; an interrupted run goes on where it stopped."""

    questions: Path | None = None
    """JSON lines: `question_id`, `text`, and `image` (a path or a list; absent for text only); or `messages` for `text`."""
    out: Path | None = None
    """File of answers (JSON lines, in the order of the questions); finished answers of the same run are reused."""
    images: Path | None = None
    """Folder that image paths are relative to."""
    batch_size: int = 8
    """Questions answered at a time; in float32 it does not change an answer."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn, from a seed of each question's own."""
    max_drop_fraction: float = 0.0
    """Nothing is answered when a larger share of the questions cannot be."""
    workers: int = 4
    """Threads that check the images."""

    def __post_init__(self) -> None:
        for name in ("questions", "out"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} FILE.jsonl is required")
        share(self, "max_drop_fraction")
        at_least(self, 1, "batch_size", "workers")
        super().__post_init__()


@dataclass
class ChatSettings(_Answering):
    """Talks with a LLaVA model in the terminal."""

    image: Path | None = None
    """Image that the first question is about; `/image FILE` adds others."""


@dataclass
class ServeSettings(_Answering):
    """Opens a page on this machine to ask a LLaVA model about images, or two of them side by side."""

    by_position: ClassVar[tuple[str, ...]] = ("against",)

    against: Path | None = None
    """Second LLaVA folder, answering beside the first; may be given by position."""
    port: int = 7860
    """Port on 127.0.0.1; 0 takes a free one."""
    max_upload_mb: int = 20
    """Largest file that may be uploaded, in megabytes."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: expected 0 to 65535, found {self.port}")
        at_least(self, 1, "max_upload_mb")
        super().__post_init__()
