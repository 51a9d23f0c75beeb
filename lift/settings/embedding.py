"""Settings of the text side, computed once: where captions and images come from, the text encoder, the embedding store."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_type_hints

from lift.common.checks import at_least


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
        at_least(self, 1, "max_length", "batch_tokens", prefix="text_encoder.")

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
        at_least(self, 1, "shard_size", "workers")
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
