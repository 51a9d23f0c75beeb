"""Settings of the commands of `lift-eval`: paths and choices come in from the command line or YAML, checked values go out.

This module imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lift.common.errors import UserError


def given(value: Path | None, name: str) -> Path:
    """The path of a required option. Raises UserError when it was not given."""
    if value is None:
        raise UserError(f"--{name} is required: a path.")
    return value


def _at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise ValueError(f"--{name}: expected at least {least}, found {value}.")


@dataclass
class HardNegativeData:
    """Where the items and the images of a hard-negative benchmark are."""

    path: Path | None = None
    """File or folder with the items, as published."""
    images: Path | None = None
    """Folder with the images that the items name; the folder `images` beside the items when not given."""


@dataclass
class RetrievalData:
    """Where images and their captions are."""

    path: Path | None = None
    """Annotation file (Karpathy's JSON, COCO's captions JSON, flickr_annotations_30k.csv), or tars in img2dataset's layout."""
    images: Path | None = None
    """Folder with the images that an annotation file names; tars hold theirs."""
    format: Literal["auto", "karpathy", "coco_captions", "flickr_csv", "webdataset"] = "auto"
    """Of the annotations; `auto` looks into the file."""
    split: str = "test"
    """Split that is taken from an annotation file with several."""


@dataclass
class ClassificationData:
    """Where images in classes are."""

    path: Path | None = None
    """Folder with one folder of images a class, or webdataset tars with a KEY.cls member."""
    classes: Path | None = None
    """JSON with the classes' names: a list, {folder: name}, or {index: [folder, name]} as ImageNet's class index. Folder names
    when not given."""
    templates: str = "openai"
    """`openai` (80 templates), `official` (the single prompt of the LIFT scripts), or a text file with one template a line in
    which `{}` is the class."""
    same_names: bool = False
    """Score classes that have one name, as some have in ImageNet's published lists; they tie, and a tie is wrong."""


@dataclass
class ProbeData:
    """Labelled images that a classifier on frozen features is trained and tested on, folders or tars as for classification."""

    train: Path | None = None
    """Images the classifier learns from."""
    test: Path | None = None
    """Images it is measured on, of the same classes."""
    classes: Path | None = None
    """Names of the classes, as for classification."""
    neighbours: int = 20
    """Neighbours that vote (k-NN)."""
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)
    """Inverse regularisation strengths among which the linear probe chooses on a part of its training images."""
    iterations: int = 5000
    """Most iterations of the linear probe's optimiser; a fit that stops there is reported."""
    seed: int = 0
    """Of the part of the training images on which the strength is chosen."""

    def __post_init__(self) -> None:
        _at_least(self.neighbours, 1, "probe.neighbours")
        _at_least(self.iterations, 1, "probe.iterations")
        if not self.strengths or not all(0 < strength < float("inf") for strength in self.strengths):
            raise ValueError(f"--probe.strengths: expected positive numbers, found {list(self.strengths)}.")


@dataclass
class EncoderSettings:
    """Measures an image-text encoder: hard negatives, zero-shot classification, retrieval, probes."""

    encoder: str
    """Folder of `lift export` or run folder of `lift pretrain`; folder or hub name of a transformers CLIP or SigLIP model; or
    open_clip:ARCHITECTURE:TAG_OR_FILE."""
    tasks: str = "sugarcrepe"
    """Names separated by commas: sugarcrepe, sugarcrepe_pp, aro_relation, aro_attribution, aro_coco_order, aro_flickr_order,
    winoground, imagenet, classification, linear_probe, knn, coco, flickr30k, retrieval."""
    out: Path | None = None
    """Folder for the results; runs/eval/ENCODER/TASKS when not given."""
    protocol: Literal["standard", "official"] = "standard"
    """`official` repeats the published LIFT evaluation scripts, also what is questionable in them."""
    allow_missing: bool = False
    """Score the items whose image is there, and record which are not, instead of stopping at the first missing image."""
    batch_size: int | None = None
    """Images encoded at a time; 16 on a CPU and 256 on a GPU when not given."""
    workers: int = 2
    """Threads that read and prepare images."""
    sugarcrepe: HardNegativeData = field(default_factory=HardNegativeData)
    """The seven files of SugarCrepe; those that exist are scored."""
    sugarcrepe_pp: HardNegativeData = field(default_factory=HardNegativeData)
    """SugarCrepe++."""
    aro_relation: HardNegativeData = field(default_factory=HardNegativeData)
    """visual_genome_relation.json and Visual Genome's images."""
    aro_attribution: HardNegativeData = field(default_factory=HardNegativeData)
    """visual_genome_attribution.json and Visual Genome's images."""
    aro_coco_order: HardNegativeData = field(default_factory=HardNegativeData)
    """coco_karpathy_test.json and COCO's images."""
    aro_flickr_order: HardNegativeData = field(default_factory=HardNegativeData)
    """flickr30k_test.json and Flickr30K's images."""
    winoground: HardNegativeData = field(default_factory=HardNegativeData)
    """Winoground's examples.jsonl and images."""
    imagenet: ClassificationData = field(default_factory=ClassificationData)
    """ImageNet-1k's validation images in folders named by WordNet id."""
    classification: ClassificationData = field(default_factory=ClassificationData)
    """Any other classes."""
    coco: RetrievalData = field(default_factory=RetrievalData)
    """COCO: Karpathy's 5k test images, or val2017."""
    flickr30k: RetrievalData = field(default_factory=RetrievalData)
    """Flickr30K: the 1k test images."""
    retrieval: RetrievalData = field(default_factory=RetrievalData)
    """Any other images with captions."""
    probe: ProbeData = field(default_factory=ProbeData)
    """For the tasks linear_probe and knn."""

    def __post_init__(self) -> None:
        _at_least(1 if self.batch_size is None else self.batch_size, 1, "batch_size")
        _at_least(self.workers, 1, "workers")


@dataclass
class DataSettings:
    """Turns an MMBench TSV into the data folder that lmms-eval finds without a network."""

    file: Path
    """MMBench TSV (index, question, hint, A-D, answer, category, image, source, l2-category, comment, split)."""
    out: Path | None = None
    """Folder that will hold `lmms-lab-encoder/MMBench`; run lmms-eval in it."""

    def __post_init__(self) -> None:
        given(self.out, "out")


@dataclass
class LmmSettings:
    """Runs lmms-eval's own MMBench task on a LLaVA folder and records every answer."""

    folder: Path
    """LLaVA folder that `LlavaForConditionalGeneration` and `AutoProcessor` load."""
    data: Path | None = None
    """MMBench TSV with the questions."""
    out: Path | None = None
    """Folder for the run. A finished run of the same model, data and settings is reused."""
    batch_size: int = 16
    """Questions answered at a time."""
    max_new_tokens: int = 16
    """Longest answer in tokens; MMBench asks for one letter."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is float32 on a CPU and the folder's own format on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        given(self.data, "data")
        given(self.out, "out")
        _at_least(self.batch_size, 1, "batch_size")
        _at_least(self.max_new_tokens, 1, "max_new_tokens")


@dataclass
class StockSettings:
    """Checks a run against lmms-eval's own `llava_hf` model: the same answers, row by row."""

    folder: Path
    """LLaVA folder that the run evaluated."""
    data: Path | None = None
    """MMBench TSV that the run answered."""
    against: Path | None = None
    """Run folder written by `lift-eval lmm` in float32."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        given(self.data, "data")
        given(self.against, "against")


@dataclass
class ScoreSettings:
    """Scores answers by MMBench's rules: circular and first-pass accuracy, parse failures."""

    file: Path
    """`records.jsonl` of a run, or an answer file in MMBench's form (.tsv, .xlsx) with a `prediction` column."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass
class CompareSettings:
    """Compares two encoders or two LMMs on the same items, per subtask, with paired statistics."""

    run_a: Path
    """Folder written by `lift-eval encoder` or by `lift-eval lmm`; differences are A - B."""
    run_b: Path
    """Run folder of the baseline."""
    out: Path | None = None
    """Folder for the comparison."""
    name_a: str = "LIFT"
    """Name of the first run in tables."""
    name_b: str = "CLIP"
    """Name of the second run in tables."""
    resamples: int = 10_000
    """Bootstrap resamples of the question groups."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        _at_least(self.resamples, 100, "resamples")
        if self.name_a == self.name_b:
            raise ValueError(f"--name_a and --name_b: expected two different names, found '{self.name_a}' twice.")


@dataclass
class ReportSettings:
    """Writes a comparison as one HTML page that needs no network."""

    comparison: Path
    """Folder written by `lift-eval compare`."""
    out: Path = Path("report.html")
    """HTML file to write."""
    encoder_a: Path | None = None
    """Folder written by `lift-eval encoder` for the encoder of run A."""
    encoder_b: Path | None = None
    """The same for run B."""
    stages: Path | None = None
    """JSON list of {"stage", "seconds", "peak_gb", "reused"} to show what the chain took."""
    flips: int = 6
    """Questions shown that one model gets and the other misses."""

    def __post_init__(self) -> None:
        _at_least(self.flips, 0, "flips")
        if (self.encoder_a is None) != (self.encoder_b is None):
            raise ValueError("--encoder_a and --encoder_b: give both or neither.")


@dataclass
class CostSettings:
    """Counts FLOPs and parameters, and measures peak memory, of a training sample for LIFT and CLIP by caption length."""

    out: Path
    """Folder for cost.json, cost.csv and cost.html."""
    lift: Path | None = None
    """Recipe of LIFT (YAML of `lift pretrain`); by default the paper's ViT-B/16. Its data need not be there."""
    clip: Path | None = None
    """Recipe of the CLIP baseline; by default the paper's."""
    embedding_dim: int | None = None
    """Dimension of LIFT's text embeddings: by default 4096 (NV-Embed-v2), or that of the recipe's encoder where it is known."""
    lengths: list[int] = field(default_factory=lambda: [77, 128, 323])
    """Caption lengths in tokens that the table shows; the plot goes from 16 to 512 in any case."""
    memory_batch_size: int = 128
    """Samples in the training step whose peak memory is measured (CUDA only)."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("--lengths: expected at least one caption length, as in [77,128], found none.")
        for length in self.lengths:
            _at_least(length, 2, "lengths")
        _at_least(self.memory_batch_size, 1, "memory_batch_size")
        if self.embedding_dim is not None:
            _at_least(self.embedding_dim, 1, "embedding_dim")


@dataclass
class TextSettings:
    """Compares two text encoders on pairs close in words and far in meaning, and on pairs far in words and close in meaning."""

    encoder_a: str
    """Any encoder that `lift-eval encoder` takes, the folder of a frozen text encoder, or `minilm`."""
    encoder_b: str
    """The same for the second encoder."""
    out: Path | None = None
    """Folder for text.json, pairs.csv and scatter.html."""
    pairs: Path | None = None
    """Sentence pairs (.json or .jsonl) instead of the built-in ones: objects with first, second, same_meaning and kind."""
    captions: Path | None = None
    """Captions from which pairs are taken instead."""
    captions_format: Literal["lines", "jsonl", "coco"] | None = None
    """lines: one caption a line; jsonl: objects with `caption` and, where known, `image`; coco: COCO captions. By the suffix
    when left out: .txt is lines, .jsonl is jsonl, .json is coco."""
    high_overlap: float = 0.6
    """Captions that share at least this share of their words (Jaccard) are close in words."""
    low_overlap: float = 0.15
    """Captions that share at most this share of their words are far in words."""
    max_pairs: int = 2000
    """Pairs of each kind taken from captions at most, drawn with the seed."""
    max_captions: int = 100_000
    """Captions looked at, at most; more are sampled with the seed. Without images a fifth of that, as all are encoded."""
    resamples: int = 1000
    """Bootstrap resamples of the pairs."""
    seed: int = 0
    """Seed of the samples and of the bootstrap."""
    max_length: int = 77
    """Tokens that a frozen text encoder reads of a sentence."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of a frozen text encoder's weights; an encoder folder has its own."""

    def __post_init__(self) -> None:
        given(self.out, "out")
        if self.pairs is not None and self.captions is not None:
            raise ValueError("--pairs and --captions: give one of them, or neither for the built-in pairs.")
        if not 0 <= self.low_overlap < self.high_overlap <= 1:
            raise ValueError(
                f"--low_overlap and --high_overlap: expected 0 <= low < high <= 1, found {self.low_overlap} and "
                f"{self.high_overlap}."
            )
        for name, least in (("max_pairs", 2), ("max_captions", 2), ("resamples", 100), ("max_length", 2)):
            _at_least(getattr(self, name), least, name)
        if self.captions is not None and self.captions_format is None:
            formats: dict[str, Literal["lines", "jsonl", "coco"]] = {".txt": "lines", ".jsonl": "jsonl", ".json": "coco"}
            if self.captions.suffix not in formats:
                raise ValueError(f"--captions: the suffix of {self.captions.name} tells no format. Give --captions_format.")
            self.captions_format = formats[self.captions.suffix]
