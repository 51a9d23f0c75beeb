"""Settings of `lift pretrain`: the fixed transform of the text embeddings, the two encoders, the training recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lift.settings.embedding import SourceSettings, TextEncoderSettings


@dataclass(kw_only=True)
class TextTransformSettings:
    """Fixed linear map of the text embeddings, fitted on a sample of the embedding store and saved in it."""

    kind: Literal["none", "centre", "pca", "whiten"] = "none"
    """centre: subtract the mean; pca: also keep only the directions of largest variance; whiten: give each variance one."""
    dimensions: int | None = None
    """Dimensions kept by pca (needed) and whiten (all by default); they become those of the joint space."""
    shrinkage: float = 0.01
    """Added to the eigenvalues as a share of their mean before whitening."""
    sample: int = 100_000
    """Rows of the store to fit on at most."""

    def __post_init__(self) -> None:
        if self.kind == "pca" and self.dimensions is None:
            raise ValueError("text_transform.dimensions: pca needs the number of dimensions to keep")
        if self.kind in ("none", "centre") and self.dimensions is not None:
            raise ValueError(f"text_transform.dimensions: {self.kind} keeps all dimensions; only pca and whiten choose")
        if (self.dimensions is not None and self.dimensions < 1) or self.sample < 1 or self.shrinkage < 0:
            raise ValueError("text_transform: dimensions and sample must be positive, shrinkage not negative")


@dataclass
class TransformSettings(TextTransformSettings):
    """Fit a transform of the text embeddings on a sample of an embedding store, and save it in the store."""

    store: Path
    """Folder of the embedding store."""
    seed: int = field(default=0, kw_only=True)
    """Seeds the choice of the sample."""

    def __post_init__(self) -> None:
        if self.kind == "none":
            raise ValueError("kind: choose centre, pca or whiten; none needs no fit")
        super().__post_init__()


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
class NegativeSettings:
    """Negatives that cost no encoder pass, because the text side is fixed; for the contrastive and sigmoid objectives."""

    bank: Path | None = None
    """Embedding store whose captions are further negatives of every image; captions of other images than the training's."""
    bank_rows: int = 4096
    """Rows of the bank in a step, drawn anew in each."""
    hard: Path | None = None
    """Embedding store with hard negative captions of each image, under the keys SAMPLE_KEY#0, SAMPLE_KEY#1, ..."""
    hard_per_image: int = 1
    """Hard negatives of an image at most; an image may have fewer, or none."""


@dataclass(kw_only=True)
class ValidationSettings:
    """Held-out pairs that are looked at during training; the first caption of each image counts."""

    data: list[SourceSettings] = field(default_factory=list)
    """Where they come from; none for no validation."""
    embeddings: Path | None = None
    """Their embedding store; made here when it is not there. Defaults to OUT/validation_embeddings. Not used by clip."""
    every: int = 500
    """Steps."""
    samples: int = 5000
    """At most so many, the first ones."""
    best: Literal["loss", "recall"] = "recall"
    """What makes a checkpoint the best one: the lowest loss, or the highest mean R@1 of both directions."""


@dataclass(kw_only=True)
class PretrainSettings:
    """Pretrain a LIFT encoder (contrastive, cosine or sigmoid) or the CLIP baseline.

    Defaults are the official recipe's (fixtures note `official_lift_tiny`): AdamW 1e-3, betas 0.9/0.98, eps 1e-6, weight decay
    0.2 on matrices only, 500 warm-up steps, cosine to zero, gradient norm 1.0, random resized crop of 0.9-1.0.
    """

    data: list[SourceSettings]
    """Where images and captions come from."""
    out: Path
    """Run folder."""
    objective: Literal["contrastive", "cosine", "sigmoid", "clip"] = "contrastive"
    """contrastive, cosine and sigmoid train LIFT against the embedding store; clip trains both towers."""
    embeddings: Path | None = None
    """Embedding store; made here when it is not there. Defaults to OUT/embeddings. Not used by clip."""
    text_encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    """Text encoder of the store."""
    text_transform: TextTransformSettings = field(default_factory=TextTransformSettings)
    """Fixed linear map of the text embeddings, fitted on the store."""
    captions: Literal["first", "random", "all"] = "random"
    """Which of several captions of an image an epoch uses; all: it goes through the captions, not the images."""
    negatives: NegativeSettings = field(default_factory=NegativeSettings)
    """Negatives beside the other captions of the batch."""
    vision: VisionSettings = field(default_factory=VisionSettings)
    """The image encoder."""
    clip_text: ClipTextSettings = field(default_factory=ClipTextSettings)
    """The CLIP baseline's text tower."""
    batch_size: int = 256
    """Samples in one optimiser step over all processes."""
    micro_batch_size: int | None = None
    """Samples in one forward pass of a process; less than its share of the batch saves memory and gives the same gradients,
    at the price of a second forward pass."""
    epochs: float = 1.0
    """Passes over the data; the steps are rounded up."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """First AdamW coefficient."""
    beta2: float = 0.98
    """Second AdamW coefficient."""
    epsilon: float = 1e-6
    """AdamW epsilon."""
    weight_decay: float = 0.2
    """On parameters with two or more dimensions."""
    warmup_steps: int = 500
    """Linear warm-up; at most a tenth of a shorter run."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm; null for none, as in the official CLIP baseline."""
    initial_logit_scale: float | None = None
    """1/temperature at the start; by default 1/0.07, for sigmoid 10 (SigLIP)."""
    max_logit_scale: float = 100.0
    """1/temperature is kept between 1 and this."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random resized crop."""
    patch_dropout: float = 0.0
    """Share of the patches that are left out of each training image (FLIP); none are when features are measured."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast with float32 weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile the model."""
    loss_tile: int = 1024
    """Rows and columns of the logits in memory at a time."""
    seed: int = 0
    """Seeds the weights, the sample order, the crops and the choice of captions."""
    workers: int = 1
    """Processes that read images, for each training process."""
    log_every: int = 10
    """Steps."""
    checkpoint_every: int = 500
    """Steps; the two newest checkpoints are kept, and the best when there is validation."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """Held-out pairs."""
    max_drop_fraction: float = 0.01
    """The run fails when a larger share of samples cannot be used."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "learning_rate", "log_every", "checkpoint_every", "loss_tile"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, found {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size <= 0:
            raise ValueError(f"micro_batch_size: expected a positive number or null, found {self.micro_batch_size}")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout: expected a share from 0 to below 1, found {self.patch_dropout}")
        if self.objective in ("cosine", "clip") and (self.negatives.bank or self.negatives.hard):
            raise ValueError(f"negatives: the {self.objective} objective has none; they go with contrastive and sigmoid")
        self.embeddings = self.embeddings or self.out / "embeddings"

    @property
    def validation_embeddings(self) -> Path:
        return self.validation.embeddings or self.out / "validation_embeddings"
