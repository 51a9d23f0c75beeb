"""All settings of the `lift` room: where captions and images come from, the text side, the encoders, the training recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class SourceSettings:
    """One source of image-caption pairs."""

    kind: Literal["webdataset", "coco_captions", "llava_json"]
    """webdataset: tars as img2dataset writes them; coco_captions: a COCO captions JSON; llava_json: a LLaVA-Pretrain JSON."""
    path: Path
    """A tar or a folder of tars (webdataset), or the JSON file (the other kinds)."""
    images: Path | None = None
    """Folder of the images; needed by the JSON kinds."""
    name: str = ""
    """Prefix of this source's keys; defaults to the kind. Give one when two sources are of the same kind."""

    def __post_init__(self) -> None:
        self.name = self.name or self.kind
        if self.kind != "webdataset" and self.images is None:
            raise ValueError(f"data.images: a source of kind {self.kind} needs the folder of its images")


@dataclass(kw_only=True)
class TextEncoderSettings:
    """The frozen text encoder that embeds the captions."""

    kind: Literal["minilm", "sentence_transformer", "causal_lm"] = "minilm"
    """minilm: the packaged all-MiniLM-L6-v2; sentence_transformer: any such model; causal_lm: hidden states of an LLM."""
    path: str | None = None
    """Folder or hub name of the model; not used by minilm."""
    pooling: Literal["mean", "last"] = "mean"
    """Pooling over the caption's tokens; used by causal_lm only, sentence-transformers models bring their own."""
    prompt: str = ""
    """Put before every caption."""
    max_length: int = 77
    """Tokens; longer captions are truncated, as in the official recipe (77 short, 323 long)."""
    batch_size: int = 256
    """Captions in one forward pass."""

    def __post_init__(self) -> None:
        if self.kind != "minilm" and not self.path:
            raise ValueError(f"text_encoder.path: kind {self.kind} needs a model folder or name")


@dataclass(kw_only=True)
class EmbedSettings:
    """Embed the captions of a data source once, with a frozen text encoder."""

    data: list[SourceSettings]
    """Where the captions come from."""
    out: Path
    """Folder of the embedding store."""
    text_encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    """The text encoder."""
    max_drop_fraction: float = 0.01
    """The run fails when a larger share of samples cannot be used."""


@dataclass(kw_only=True)
class VisionSettings:
    """The image encoder: CLIP's ViT (class token, pre-LN, plain GELU)."""

    image_size: int = 224
    """Pixels."""
    patch_size: int = 16
    """Pixels."""
    width: int = 768
    """Hidden size."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden size of the MLP over the width."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"vision.image_size: {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"vision.width: {self.width} is not a multiple of the number of heads {self.heads}")


@dataclass(kw_only=True)
class ClipTextSettings:
    """The text tower that the CLIP baseline trains jointly; LIFT has none."""

    width: int = 512
    """Hidden size; 512 as in ViT-B CLIP."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads."""
    context_length: int = 77
    """Tokens."""
    embedding_dim: int = 512
    """Dimension of the joint space."""
    tokenizer: Path | None = None
    """Folder of a tokenizer; without one a byte-level BPE is trained on the captions."""
    vocabulary_size: int = 49408
    """Size of the trained vocabulary at most."""


@dataclass(kw_only=True)
class PretrainSettings:
    """Pretrain a LIFT encoder (contrastive or cosine) or the CLIP baseline.

    Defaults are the official recipe's (fixtures note `official_lift_tiny`): AdamW 1e-3, betas 0.9/0.98, eps 1e-6, weight decay
    0.2 on matrices only, 500 warm-up steps, cosine to zero, gradient norm 1.0, random resized crop of 0.9-1.0.
    """

    data: list[SourceSettings]
    """Where images and captions come from."""
    out: Path
    """Run folder."""
    objective: Literal["contrastive", "cosine", "clip"] = "contrastive"
    """contrastive and cosine train LIFT against the embedding store; clip trains both towers."""
    embeddings: Path | None = None
    """Embedding store; made here when it is not there. Defaults to OUT/embeddings. Not used by clip."""
    text_encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    """Text encoder of the store."""
    text_transform: Literal["none", "centre", "whiten"] = "none"
    """Fixed linear map of the text embeddings, fitted on the store."""
    whiten_shrinkage: float = 0.01
    """Added to the eigenvalues as a share of their mean before whitening."""
    captions: Literal["first", "random"] = "random"
    """Which of several captions of an image an epoch uses."""
    vision: VisionSettings = field(default_factory=VisionSettings)
    """The image encoder."""
    clip_text: ClipTextSettings = field(default_factory=ClipTextSettings)
    """The CLIP baseline's text tower."""
    batch_size: int = 256
    """Samples in one optimiser step over all processes."""
    epochs: float = 1.0
    """Passes over the data; the steps are rounded up."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    beta2: float = 0.98
    """Second AdamW coefficient; the first is 0.9."""
    epsilon: float = 1e-6
    """AdamW epsilon."""
    weight_decay: float = 0.2
    """On parameters with two or more dimensions."""
    warmup_steps: int = 500
    """Linear warm-up; at most a tenth of a shorter run."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm; null for none."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random resized crop."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast with float32 weights."""
    seed: int = 0
    """Seeds the weights, the sample order, the crops and the choice of captions."""
    workers: int = 1
    """Processes that read images, for each training process."""
    log_every: int = 10
    """Steps."""
    checkpoint_every: int = 500
    """Steps; the two newest checkpoints are kept."""
    max_drop_fraction: float = 0.01
    """The run fails when a larger share of samples cannot be used."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "learning_rate", "log_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, found {getattr(self, name)}")
        self.embeddings = self.embeddings or self.out / "embeddings"


def given(value: Path | None, name: str) -> Path:
    """The path of a required option beside a positional one. Raises ValueError when it was not given."""
    if value is None:
        raise ValueError(f"--{name} is required: a path")
    return value


@dataclass
class ExportSettings:
    """Write the encoder of a run as a folder that transformers loads, or as a checkpoint for the official LIFT code."""

    run: Path
    """Run folder of `lift pretrain`; for --format official also an encoder folder."""
    out: Path | None = None
    """Encoder folder, or checkpoint file (.pt), to write."""
    format: Literal["folder", "official"] = "folder"
    """folder: CLIPVisionModel with head and model card; official: a checkpoint as the official LIFT code loads it."""
    step: int | None = None
    """Checkpoint to export; the newest by default."""

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
        if self.head_width is not None and self.head_width < 1:
            raise ValueError(f"head_width: expected a positive number, found {self.head_width}")


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
        for name in ("batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, found {getattr(self, name)}")


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
