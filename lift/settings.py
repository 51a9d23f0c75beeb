"""All settings of the `lift` room: where captions and images come from, the text side, the encoders, the training recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_type_hints


@dataclass(kw_only=True)
class SourceSettings:
    """One source of image-caption pairs."""

    kind: Literal["webdataset", "official_lift", "coco_captions", "llava_json", "hf_dataset"]
    """webdataset: tars as img2dataset writes them; official_lift: caption parquets and image folders of the official code;
    coco_captions: a COCO captions JSON; llava_json: a LLaVA-Pretrain JSON; hf_dataset: a Hugging Face datasets table."""
    path: str
    """A tar or a folder of tars, or its URL (webdataset: s3://, hf://, ...); a caption parquet or a folder of them
    (official_lift); the JSON file; the name or folder of the table (hf_dataset)."""
    images: str | None = None
    """Folder of the images; needed by official_lift and the JSON kinds."""
    name: str = ""
    """Prefix of this source's keys; defaults to the kind. Give one when two sources are of the same kind."""
    caption_fields: list[str] | None = None
    """Fields or columns with the captions, in order: of KEY.json, or txt for KEY.txt (webdataset; captions, caption or the
    text by default), re_caption and org_caption (official_lift; the long re_caption by default), columns (hf_dataset)."""
    image_field: str = "image"
    """Column of the images (hf_dataset)."""
    key_field: str | None = None
    """Column of the keys (hf_dataset); the row number by default."""
    split: str = "train"
    """Split of the table (hf_dataset)."""
    index: Path | None = None
    """Folder of the index built once of this source; by default in $LIFT_CACHE, or ~/.cache/lift."""

    def __post_init__(self) -> None:
        self.path = str(self.path)
        self.images = None if self.images is None else str(self.images)
        self.name = self.name or self.kind
        if self.kind in ("official_lift", "coco_captions", "llava_json") and self.images is None:
            raise ValueError(f"data.images: a source of kind {self.kind} needs the folder of its images")
        if self.caption_fields and self.kind in ("coco_captions", "llava_json"):
            raise ValueError(f"data.caption_fields: a source of kind {self.kind} has its captions in one place only")

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

    kind: Literal["auto", "minilm", "sentence_transformer", "causal_lm", "nv_embed"] = "auto"
    """minilm: the packaged all-MiniLM-L6-v2; sentence_transformer: any such model; causal_lm: hidden states of an LLM;
    nv_embed: NV-Embed-v2; auto: what the model folder declares itself to be, or minilm where there is no path."""
    path: str | None = None
    """Folder or hub name of the model; minilm has none."""
    pooling: Literal["mean", "last"] = "mean"
    """Pooling over the caption's tokens; used by causal_lm only. last: the end-of-sequence token, which is put after every
    caption (the paper's ablation)."""
    prompt: str = ""
    """Instruction, put before every caption as it is: a separating space or line break belongs to it. nv_embed leaves it out of
    the pooling, as the reference does; sentence-transformers models treat it as they declare."""
    max_length: int = 77
    """Tokens, prompt and special tokens included; longer captions are truncated, as in the official recipe (77 short, 323
    long), and counted."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of weights and activations; auto: bf16 where the GPU, or without one the CPU, computes in it, else fp32; what it came
    to is recorded. Pooling is float32."""
    normalise: bool = False
    """Scale embeddings to unit length before they are stored; the official recipe does not."""
    batch_tokens: int | None = None
    """Tokens in one forward pass, padding included; by default 1024 on a CPU (larger batches leave its cache) and 16384 on a
    GPU. Changes embeddings by no more than rounding."""

    def __post_init__(self) -> None:
        if self.kind == "minilm" and self.path:
            raise ValueError(f"text_encoder.path: kind minilm takes no path, found {self.path}; kind auto reads what is there")
        if self.kind not in ("auto", "minilm") and not self.path:
            raise ValueError(f"text_encoder.path: kind {self.kind} needs a model folder or name")
        for name in ("max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"text_encoder.{name}: expected a positive number, found {value}")

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
class CheckDataSettings:
    """Read a data source once and report counts, caption lengths, image sizes, faults and duplicates; fails if unusable."""

    data: list[SourceSettings]
    """Where images and captions come from."""
    out: Path = Path("runs/check_data")
    """Folder for report.json and dropped.jsonl."""
    embeddings: Path | None = None
    """Embedding store whose keys are looked up."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer that counts tokens; the packaged all-MiniLM-L6-v2's by default."""
    max_length: int = 77
    """Captions with more tokens are counted."""
    workers: int = 2
    """Processes that decode images; 0 for none beside this one."""
    max_drop_fraction: float = 0.01
    """The source is unusable when a larger share of samples cannot be used."""


@dataclass(kw_only=True)
class ImportEmbeddingsSettings:
    """Make an embedding store of embeddings that were computed elsewhere."""

    kind: Literal["official_parquet", "npy", "safetensors"]
    """official_parquet: the official LIFT layout, a folder of folders of parquet files with `key` and `embedding`; npy: one
    array [rows, dimension]; safetensors: one tensor of that shape."""
    path: Path
    """The folder (official_parquet) or the file."""
    out: Path
    """Folder of the embedding store."""
    text_encoder: TextEncoderSettings | None = None
    """The text encoder that made the embeddings, with its prompt and max_length; must be given."""
    dtype: Literal["float16", "int8"] = "float16"
    """How the store keeps embeddings."""
    key_file: Path | None = None
    """Keys of the rows of a npy or safetensors file, in order."""
    key_format: Literal["lines", "jsonl"] = "lines"
    """lines: one key a line; jsonl: objects with `key` and `caption`, which lets training check the captions."""
    tensor: str | None = None
    """Name of the tensor in a safetensors file that has several."""
    key_prefix: str | None = None
    """Put before every key: the name of the data source and a slash. `official_lift/` for official_parquet, else nothing."""
    key_suffix: str | None = None
    """Put after every key: the position of the caption among those of its image. `#0` for official_parquet, else nothing."""
    max_drop_fraction: float = 0.01
    """The import fails when a larger share of rows cannot be used."""

    def __post_init__(self) -> None:
        official = self.kind == "official_parquet"
        if self.text_encoder is None:
            raise ValueError("text_encoder: say which one made the embeddings (--text_encoder.kind, --text_encoder.path)")
        if official != (self.key_file is None):
            needed = "has its keys in the parquet files" if official else "needs a file with the keys of its rows"
            raise ValueError(f"key_file: {self.kind} {needed}")
        if self.tensor is not None and self.kind != "safetensors":
            raise ValueError(f"tensor: {self.kind} has no named tensors")
        self.key_prefix = self.key_prefix if self.key_prefix is not None else "official_lift/" if official else ""
        self.key_suffix = self.key_suffix if self.key_suffix is not None else "#0" if official else ""


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
