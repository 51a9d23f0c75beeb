"""Settings of conversations: where they are, and what is looked at before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lift.common.checks import at_least, share


@dataclass(kw_only=True)
class ConversationSource:
    """Conversations, and where the images are that they name."""

    annotations: Path
    """LLaVA JSON (a list) or JSON lines: `id`, `image` (absent for text only), `conversations`; or the folder of a Hugging
    Face `datasets` table with `messages` and `images`: saved to disk, or parquet or arrow files."""
    images: Path | None = None
    """Folder of the images, a tar with them, or a folder of such tars; member names are the rows' image names. May be left
    out where no row names an image, or a table holds the images themselves."""
    split: str = "train"
    """Split of a table; of no account for JSON."""


@dataclass(kw_only=True)
class DataChoice:
    """Which conversations to look at, and how they become tokens: those of a recipe, or a file."""

    aliases: ClassVar[dict[str, str]] = {"config": "recipe"}

    recipe: Path | None = None
    """Recipe of `lmm train` or `lmm finetune`, whose data, model, template and max_length are taken."""
    stage: Literal["stage1", "stage2"] | None = None
    """Stage of a recipe of `lmm finetune`; its last one when left out."""
    data: Path | None = None
    """LLaVA JSON or JSON lines, or the folder of a `datasets` table, in place of a recipe."""
    images: Path | None = None
    """Folder, tar or folder of tars with the images of `data`."""
    split: str | None = None
    """Split of a table; train when left out."""
    tokenizer: Path | None = None
    """Folder with a tokenizer: of a LLaVA model, of a language model, or an original Llama one (tokenizer.model)."""
    template: Literal["plain", "vicuna_v1", "chat"] | None = None
    """How a conversation of `data` becomes text, as in `lmm train`; vicuna_v1 when left out."""
    max_length: int | None = None
    """Longest usable sample in tokens, image tokens included."""

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.data is None):
            raise ValueError("expected either --config RECIPE or --data FILE")
        given = "--data" if self.recipe is None else "--config"
        for name in ("stage",) if self.recipe is None else ("images", "split", "template", "tokens_per_image"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"--{name}: has no say beside {given}. Leave it out.")
        at_least(self, 1, "max_length")


@dataclass(kw_only=True)
class InspectMaskSettings(DataChoice):
    """Prints samples as training sees them, the supervised tokens in colour."""

    n: int | None = None
    """Number of samples, from the first; 5 when left out, all with --json."""
    json: bool = False
    """One JSON object a sample: `id`, `input_ids` with one placeholder an image, `labels`, `supervised` as text; a sample that
    cannot be used has `id` and `dropped`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.tokenizer is None:
            raise ValueError("--data needs --tokenizer DIR")
        at_least(self, 1, "n")


@dataclass(kw_only=True)
class CheckDataSettings(DataChoice):
    """Checks every conversation and image, and prints faults by cause, token lengths and supervised tokens."""

    tokens_per_image: int | None = None
    """Image tokens an image; the model's when --tokenizer is a LLaVA folder, else 576 as in LLaVA-1.5."""
    decode: bool = True
    """Decodes every image to its end; `false` only looks at the conversations."""
    workers: int = 2
    """Processes that read and decode."""
    max_drop_fraction: float | None = None
    """The exit status is 2 when a larger share of the samples cannot be used; the recipe's, else 0.01, when left out."""
    out: Path | None = None
    """Folder for `report.json` and `dropped.jsonl`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self, "max_drop_fraction")
        at_least(self, 1, "tokens_per_image")
        at_least(self, 0, "workers")
