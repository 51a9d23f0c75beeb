"""Settings of `lift-eval encoder`: what is measured, and where the data of each task are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lift.common.checks import at_least


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
        at_least(self, 1, "neighbours", "iterations", prefix="--probe.")
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
        at_least(self, 1, "batch_size", "workers", prefix="--")
