"""Zero-shot classification: is an image nearest to the prompts of its class?

A class is the mean of its prompts' embeddings, as in the CLIP paper (arXiv 2103.00020, section 3.1.4). The official protocol
computes as the LIFT repository's ImageNet script does: one prompt, float16 similarities for a frozen text encoder, softmax,
topk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.features import Features, normalised
from eval.settings import ClassificationData
from eval.tasks import Scored, Task, TaskData
from eval.tasks.class_images import LabelledImages, read_class_images
from eval.tasks.class_ranking import ClassRanks, class_results, concatenated, rank_classes
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import require_file, sha256_text

OFFICIAL_TEMPLATE = "It is a photo of a {}"
IMAGES_AT_A_TIME = 512
"""Rows of a block of similarities; the official script's batch, whose shape decides how float16 products are rounded."""
PROMPTS_AT_A_TIME = 8192
"""Prompts whose embeddings are in memory together."""


@dataclass
class ZeroShot:
    """The data of one task."""

    task: str
    labelled: LabelledImages
    templates: list[str]
    same_names: bool


def read_classification(task: str, settings: ClassificationData, allow_missing: bool) -> TaskData:
    """Images with their classes, and the prompts of the standard protocol.

    Raises:
        UserError: what `read_class_images` and `read_templates` raise, a single class, classes without names.
    """
    path = given(settings.path, f"{task}.path")
    labelled = read_class_images(path, settings.classes, allow_missing)
    templates = read_templates(settings.templates, f"{task}.templates")
    if not labelled.named:
        raise UserError(
            f"{path}: expected names that a text encoder knows, found '{labelled.names[0]}' and the like. Give "
            f"--{task}.classes, a JSON file with the classes' names."
        )
    if len(labelled.classes) < 2:
        raise UserError(f"{path}: expected at least two classes, found only '{labelled.names[0]}'.")
    unique = list({image.content_hash: image for image in labelled.images}.values())
    data_hash = sha256_text(f"{labelled.content_hash()} {templates}")
    notes = labelled.notes | {"templates": settings.templates, "prompts_per_class": len(templates)}
    texts = sorted(set(prompts(labelled.names, templates)))
    items = ZeroShot(task, labelled, templates, settings.same_names)
    return TaskData(items, unique, texts, data_hash, labelled.missing, notes)


def read_templates(choice: str, setting: str = "templates") -> list[str]:
    """`official`, `openai`, or the lines of a text file. Raises UserError for a line without `{}` and for no lines."""
    if choice == "official":
        return [OFFICIAL_TEMPLATE]
    if choice == "openai":
        text = Path(__file__).with_name("openai_templates.txt").read_text(encoding="utf-8")
        return text.splitlines()
    path = require_file(Path(choice), f"`openai`, `official` or a text file with one template a line as --{setting}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    for number, line in enumerate(lines, 1):
        if line and "{}" not in line:
            raise UserError(f"{path}, line {number}: expected {{}} where the class's name goes, found '{line[:60]}'.")
    if not any(lines):
        raise UserError(f"{path}: expected one template a line, found no text.")
    return [line for line in lines if line]


def prompts(names: list[str], templates: list[str]) -> list[str]:
    """All of the first class, then of the next. An underscore in a name stands for a space, as in ImageNet's class index."""
    return [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]


def score_classification(data: TaskData, features: Features) -> Scored:
    """Raises UserError when two classes share a name, unless `same_names` or the official protocol is set."""
    items: ZeroShot = data.items
    labelled = items.labelled
    official = features.protocol == "official"
    same = [name for name, count in Counter(prompts(labelled.names, ["{}"])).items() if count > 1]
    if same and not official and not items.same_names:
        raise UserError(
            f"--{items.task}.classes: two classes have one name and cannot be told apart: {', '.join(map(repr, same[:5]))}. "
            f"Rename one of each, or give --{items.task}.same_names true to count their images as wrong."
        )
    # images before texts: of two models, the smaller one finds a fault sooner
    image_ND = features.images(labelled.images)
    if official:
        ranks = concatenated(official_ranks(image_ND, official_class_embeddings(features, labelled.names), labelled.label_N))
    else:
        class_CD = class_embeddings(features, labelled.names, items.templates)
        ranks = concatenated(zero_shot_ranks(image_ND, class_CD, labelled.label_N))
    scored = class_results(labelled, ranks)
    scored.details["templates"] = [OFFICIAL_TEMPLATE] if official else items.templates
    scored.details["same_names"] = same
    return scored


def class_embeddings(features: Features, names: list[str], templates: list[str]) -> np.ndarray:
    """float32 [C, D]: the normalised mean of the normalised embeddings of a class's prompts."""
    together = max(1, PROMPTS_AT_A_TIME // len(templates))
    parts = []
    for start in range(0, len(names), together):
        some = names[start : start + together]
        prompt_PD = features.texts(prompts(some, templates), f"class prompts {start}")
        parts.append(normalised(prompt_PD.reshape(len(some), len(templates), -1).mean(axis=1)))
    return np.concatenate(parts)


def zero_shot_ranks(image_ND: np.ndarray, class_CD: np.ndarray, label_N: np.ndarray) -> Iterator[ClassRanks]:
    """Ranks by cosine similarity, a block of images at a time.

    Equal class embeddings are multiplied once: a matrix product may round two equal columns differently, and a tie would then
    be settled by noise.
    """
    unique_UD, row_C = np.unique(class_CD, axis=0, return_inverse=True)
    for start in range(0, len(image_ND), IMAGES_AT_A_TIME):
        scores_BU = image_ND[start : start + IMAGES_AT_A_TIME] @ unique_UD.T
        yield rank_classes(scores_BU[:, row_C], label_N[start : start + IMAGES_AT_A_TIME])


def official_class_embeddings(features: Features, names: list[str]) -> Tensor:
    """[C, D], float16 for a frozen text encoder, else float32; normalised in that type."""
    texts = prompts(names, [OFFICIAL_TEMPLATE])
    if features.encoder.has_frozen_text:
        text_CD = torch.from_numpy(features.aligned_texts(texts, "class prompts")).half()
    else:
        text_CD = torch.from_numpy(features.texts(texts, "class prompts"))
    return text_CD / text_CD.norm(dim=-1, keepdim=True)


def official_ranks(image_ND: np.ndarray, text_CD: Tensor, label_N: np.ndarray) -> Iterator[ClassRanks]:
    """Right where the script says so: the label is among `topk(1)`, or `topk(5)`, of the softmax in the text's number format.

    torch settles ties there, so a rank below 5 is a place in topk's answer, and a tie may be right. Beyond it the rank counts
    the classes that score at least as much. A tie is noted where the right class shares the first place, right or wrong.
    """
    for start in range(0, len(image_ND), IMAGES_AT_A_TIME):
        label_B1 = torch.from_numpy(label_N[start : start + IMAGES_AT_A_TIME])[:, None]
        image_BD = torch.from_numpy(image_ND[start : start + IMAGES_AT_A_TIME])
        image_BD = (image_BD / image_BD.norm(dim=-1, keepdim=True)).to(text_CD.dtype)
        similarity_BC = (100.0 * image_BD @ text_CD.T).softmax(dim=-1)
        first_B1 = similarity_BC.topk(1, dim=-1).indices
        best_BK = similarity_BC.topk(min(5, similarity_BC.shape[1]), dim=-1).indices
        own = rank_classes(similarity_BC.float().numpy(), label_B1[:, 0].numpy())
        among_B = (best_BK == label_B1).any(dim=-1).numpy()
        place_B = (best_BK == label_B1).int().argmax(dim=-1).numpy()
        is_first_B = (first_B1 == label_B1)[:, 0].numpy()
        rank_B = np.where(among_B, np.maximum(place_B, 1), np.maximum(own.rank_N, best_BK.shape[1]))
        tie_B = ((similarity_BC == similarity_BC.amax(dim=-1, keepdim=True)).sum(dim=-1) > 1).numpy()
        at_top_B = (similarity_BC.gather(1, label_B1) == similarity_BC.amax(dim=-1, keepdim=True))[:, 0].numpy()
        yield ClassRanks(np.where(is_first_B, 0, rank_B), tie_B & at_top_B, first_B1[:, 0].numpy(), own.scores_NK)


IMAGENET = Task(partial(read_classification, "imagenet"), score_classification, "imagenet")
CLASSIFICATION = Task(partial(read_classification, "classification"), score_classification, "classification")
