"""Settings of the commands that take a trained encoder: export, import, encode, push."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lift.common.checks import at_least, given
from lift.settings.embedding import TextEncoderSettings


@dataclass
class ExportSettings:
    """Write the encoder of a run as a folder that transformers loads, or as a checkpoint for the official LIFT code."""

    run: Path
    """Run folder of `lift pretrain`; for --format official also an encoder folder."""
    out: Path | None = None
    """Encoder folder, or checkpoint file (.pt), to write."""
    format: Literal["folder", "official"] = "folder"
    """folder: CLIPVisionModel with head and model card; official: a checkpoint as the official LIFT code loads it."""
    step: int | Literal["best"] | None = None
    """Checkpoint to export; the newest by default, best for the one with the best validation."""

    def __post_init__(self) -> None:
        given(self.out, "out")


@dataclass
class ImportSettings:
    """Read a checkpoint of the official LIFT code and write it as an encoder folder."""

    checkpoint: Path
    """`epoch_N.pt` as the official training writes it, a bare state dict, or safetensors."""
    out: Path | None = None
    """Encoder folder to write."""
    model_config: Path | None = None
    """The official model's JSON (LIFT-ViT-B-16.json), for what shapes cannot tell."""
    head_width: int | None = None
    """Features of one attention head, when there is no --model_config; 64 by default, as in the published models."""
    text_encoder: TextEncoderSettings | None = None
    """The text encoder that it was aligned to, for encoding texts; the published models: NV-Embed-v2, max_length 77 or 323."""
    tokenizer: Path | None = None
    """Folder of CLIP's tokenizer, for encoding texts with an official CLIP baseline."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        at_least(self, 1, "head_width")


@dataclass
class EncodeSettings:
    """Embed image files with an encoder folder: a .npy of one float32 row an image, in sorted order of the file names."""

    folder: Path
    """Encoder folder (lift export, lift import)."""
    images: Path | None = None
    """Folder of image files; folders below it are read too."""
    out: Path | None = None
    """The .npy file to write; the names of the rows go into a .json file beside it."""
    raw: bool = False
    """Leave the embeddings as the head gives them; they are L2-normalised otherwise."""
    protocol: Literal["standard", "official"] = "standard"
    """standard: the folder's image processor (as in training); official: as the official evaluation scripts do (ImageNet's)."""
    allow_undecodable: bool = False
    """Give images that cannot be decoded a row of NaN and list them, instead of stopping at the first."""
    batch_size: int = 64
    """Images in one forward pass."""
    workers: int = 4
    """Threads that read images."""

    def __post_init__(self) -> None:
        given(self.images, "images")
        if given(self.out, "out").suffix != ".npy":
            raise ValueError(f"out: expected a file name that ends in .npy, found {self.out}")
        at_least(self, 1, "batch_size", "workers")


@dataclass
class PushSettings:
    """Upload an encoder folder with its model card to the Hugging Face Hub."""

    folder: Path
    """Encoder folder (lift export, lift import)."""
    repo: str | None = None
    """Repository: NAME or ORGANISATION/NAME."""
    private: bool = False
    """Create the repository as a private one."""
    license: str | None = None
    """Licence of the weights for the card, as the Hub spells it (mit, cc-by-nc-4.0); the card says so when none is given."""
    results: Path | None = None
    """results.json of `lift-eval encoder`, measured with this folder, for the card."""

    def __post_init__(self) -> None:
        if not self.repo:
            raise ValueError("--repo is required: NAME or ORGANISATION/NAME")
