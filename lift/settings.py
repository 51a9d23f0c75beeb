"""All settings of the `lift` room: where captions and images come from, the text side, the encoders, the training recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_type_hints


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

    @classmethod
    def from_string(cls, text: str) -> dict[str, str]:
        """KIND:PATH[,KEY=VALUE...], as in webdataset:tars or coco_captions:coco.json,images=photos,name=coco; repeatable."""
        kinds = get_args(get_type_hints(cls)["kind"])
        kind, _, rest = text.partition(":")
        path, *pairs = re.split(r",(?=\w+=)", rest)
        if kind not in kinds or not path:
            raise ValueError(f"expected KIND:PATH with one of the kinds {', '.join(kinds)}, found '{text}'")
        return {"kind": kind, "path": path} | dict(pair.split("=", 1) for pair in pairs)


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
        if self.kind == "minilm" and self.path:
            raise ValueError(
                f"text_encoder.path: kind minilm is the packaged model, found {self.path}. Give text_encoder.kind too"
            )

    @classmethod
    def from_string(cls, text: str) -> dict[str, str]:
        """the folder or hub name of a model."""
        return {"path": text}


@dataclass(kw_only=True)
class EmbedSettings:
    """Embed captions once, with a frozen text encoder.

    Stopped at any moment and started again by the same command, it goes on with the first unfinished shard.
    """

    aliases: ClassVar[dict[str, str]] = {"instruction": "text_encoder.prompt", "max_length": "text_encoder.max_length"}

    out: Path
    """Folder of the embedding store."""
    data: list[SourceSettings] = field(default_factory=list)
    """Where the captions come from; or `captions`."""
    captions: Path | None = None
    """Plain list of captions instead of `data`."""
    captions_format: Literal["lines", "jsonl"] | None = None
    """lines: one caption a line, keyed captions/LINE_NUMBER; jsonl: objects with `key` and `caption`. By the suffix when left
    out: .txt is lines, .jsonl is jsonl."""
    shard_size: int = 100_000
    """Lines of `captions` in one shard, the unit that is redone after a kill."""
    text_encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    """The text encoder."""
    dtype: Literal["float16", "int8"] = "float16"
    """How embeddings are stored."""
    engine: Literal["local", "ray"] = "local"
    """local: in this process; ray: shards spread over the workers of a Ray cluster, which share the folder `out`."""
    workers: int = 1
    """Ray workers, each with the model in memory."""
    ray_address: str = "local"
    """local: a cluster of this machine alone, for this run; auto: the running cluster; or its address (HOST:PORT)."""
    gpus_per_worker: float | None = None
    """GPUs that each Ray worker reserves; one where the cluster has any, when left out."""
    max_drop_fraction: float = 0.01
    """The run fails when a larger share of samples cannot be used."""

    def __post_init__(self) -> None:
        if bool(self.data) == (self.captions is not None):
            raise ValueError("expected either data or captions: --data KIND:PATH, or --captions FILE")
        for name in ("shard_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.engine == "local" and self.workers > 1:
            raise ValueError(f"workers: {self.workers} workers need --engine ray; local is one process")
        if self.captions is not None and self.captions_format is None:
            formats: dict[str, Literal["lines", "jsonl"]] = {".txt": "lines", ".jsonl": "jsonl"}
            if self.captions.suffix not in formats:
                raise ValueError(f"captions: the suffix of {self.captions.name} tells no format. Give captions_format")
            self.captions_format = formats[self.captions.suffix]


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


@dataclass
class ExportSettings:
    """Write the encoder of a run as a folder that transformers loads as a CLIPVisionModel."""

    run: Path
    """Run folder of `lift pretrain`."""
    out: Path
    """Encoder folder to write."""
    step: int | None = None
    """Checkpoint to export; the newest by default."""
