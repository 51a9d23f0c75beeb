"""Benchmarks of an encoder. A task reads its data from paths, names the images and texts it needs, and scores their features.

Readers know file formats and no metric; scoring knows no file. A new benchmark is one function of each and a line in `TASKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.measures import Measure, Record

if TYPE_CHECKING:
    from eval.features import Features
    from eval.images import ImageItem


@dataclass
class TaskData:
    """What a reader found: unique images and texts to encode, and items that refer to them."""

    items: Any
    """For the task's own `score`."""
    images: list[ImageItem]
    texts: list[str]
    data_hash: str
    """Over everything the score depends on: items, texts and the images' content."""
    missing: list[str] = field(default_factory=list)
    """Items left out because their image is not there, as `subtask/id`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a reader of the result should know of the data; goes into `results.json`."""


@dataclass
class Scored:
    records: Sequence[Record]
    measures: list[Measure]
    details: dict[str, Any] = field(default_factory=dict)
    """Tables beyond the measures (accuracy per class, confusion pairs); goes into `results.json`."""


Reader = Callable[[Any, bool], TaskData]
"""The task's settings and `allow_missing` come in. Raises UserError naming the faulty file or item."""
Scorer = Callable[[TaskData, "Features"], Scored]


class Task(NamedTuple):
    read: Reader
    score: Scorer
    settings: str
    """Field of `EncoderSettings` that holds its paths."""


TASKS: dict[str, str] = {
    "sugarcrepe": "eval.tasks.hard_negatives:SUGARCREPE",
    "sugarcrepe_pp": "eval.tasks.hard_negative_files:SUGARCREPE_PP",
    "aro_relation": "eval.tasks.hard_negative_files:ARO_RELATION",
    "aro_attribution": "eval.tasks.hard_negative_files:ARO_ATTRIBUTION",
    "aro_coco_order": "eval.tasks.hard_negative_files:ARO_COCO_ORDER",
    "aro_flickr_order": "eval.tasks.hard_negative_files:ARO_FLICKR_ORDER",
    "winoground": "eval.tasks.hard_negative_files:WINOGROUND",
    "coco": "eval.tasks.retrieval:COCO",
    "flickr30k": "eval.tasks.retrieval:FLICKR30K",
    "retrieval": "eval.tasks.retrieval:RETRIEVAL",
    "imagenet": "eval.tasks.classification:IMAGENET",
    "classification": "eval.tasks.classification:CLASSIFICATION",
    "linear_probe": "eval.tasks.probe:LINEAR_PROBE",
    "knn": "eval.tasks.probe:KNN",
}
"""Names for `--tasks`, and where each is defined."""


def load_task(name: str) -> Task:
    """Raises KeyError for a name that is not in `TASKS`."""
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task
