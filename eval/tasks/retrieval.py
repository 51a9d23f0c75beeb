"""Image-text retrieval with all captions of an image: R@1, R@5, R@10 and median rank both ways.

Also the official LIFT scripts' number: only the first caption of each image, right when both have the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from eval.features import Features
from eval.measures import Measure, Record
from eval.settings import RetrievalData
from eval.tasks import Scored, Task, TaskData
from eval.tasks.caption_files import CaptionedImage, read_captioned_images
from eval.tasks.ranking import ranks
from lift.common.files import sha256_text

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
FIRST = "_first"
"""Ends the subtasks that see only the first caption of each image."""


@dataclass(frozen=True)
class Pairs:
    """Captioned images, and the numbers of their unique images and texts in `TaskData`."""

    rows: list[CaptionedImage]
    image_N: np.ndarray
    """int64: number of each row's image."""
    text_N: list[np.ndarray]
    """int64: numbers of each row's captions, in order."""


def read_retrieval(name: str, settings: RetrievalData, allow_missing: bool) -> TaskData:
    """Raises UserError for what `eval.tasks.caption_files` refuses."""
    rows, missing, notes = read_captioned_images(settings, name, allow_missing)
    images = list({row.image.content_hash: row.image for row in rows}.values())
    texts = list(dict.fromkeys(caption for row in rows for caption in row.captions))
    image_number = {image.content_hash: number for number, image in enumerate(images)}
    text_number = {text: number for number, text in enumerate(texts)}
    image_N = np.array([image_number[row.image.content_hash] for row in rows])
    pairs = Pairs(rows, image_N, [np.array([text_number[caption] for caption in row.captions]) for row in rows])
    notes |= {"images": len(rows), "captions": sum(len(row.captions) for row in rows)}
    notes |= {"repeated_images": len(rows) - len(images), "repeated_captions": notes["captions"] - len(texts)}
    lines = [f"{row.id} {row.image.content_hash} {row.captions}" for row in rows]
    return TaskData(pairs, images, texts, sha256_text("\n".join(lines)), missing, notes)


def score_retrieval(data: TaskData, features: Features) -> Scored:
    """Standard protocol: all captions, and the first ones. Official: the first ones, in the script's arithmetic."""
    pairs: Pairs = data.items
    if features.protocol == "official":
        return _official(pairs, features, data)
    image_MD, text_UD = features.images(data.images), features.texts(data.texts)
    device = features.encoder.device
    # the same picture or the same sentence is one item, whatever its name: none of its copies is wrong
    texts_of: dict[int, set[int]] = {}
    images_of: dict[int, set[int]] = {}
    for image, texts in zip(pairs.image_N.tolist(), pairs.text_N, strict=True):
        texts_of.setdefault(image, set()).update(texts.tolist())
        for text in texts.tolist():
            images_of.setdefault(text, set()).add(image)
    to_text = ranks(image_MD, text_UD, [_array(texts_of[number]) for number in range(len(image_MD))], device)
    to_image = ranks(text_UD, image_MD, [_array(images_of[number]) for number in range(len(text_UD))], device)
    records = []
    for row, image, texts in zip(pairs.rows, pairs.image_N.tolist(), pairs.text_N, strict=True):
        records.append(_record(DIRECTIONS[0], row.id, row.id, to_text, image))
        for position, text in enumerate(texts.tolist()):
            records.append(_record(DIRECTIONS[1], f"{row.id}#{position}", row.id, to_image, text))
    measures = []
    for direction in DIRECTIONS:
        measures += [Measure(f"{direction}_r{k}", (direction,), "recall", k) for k in RECALL_AT]
        measures.append(Measure(f"{direction}_median_rank", (direction,), "median_rank"))
    first_records, first_measures = _first_captions(pairs, image_MD, text_UD, device)
    return Scored(records + first_records, measures + first_measures)


def _first_captions(
    pairs: Pairs, image_MD: np.ndarray, text_UD: np.ndarray, device: torch.device
) -> tuple[list[Record], list[Measure]]:
    image_ND, text_ND = image_MD[pairs.image_N], text_UD[[texts[0] for texts in pairs.text_N]]
    own = [np.array([number]) for number in range(len(pairs.rows))]
    records: list[Record] = []
    for direction, query, gallery in zip(DIRECTIONS, (image_ND, text_ND), (text_ND, image_ND), strict=True):
        found = ranks(query, gallery, own, device)
        records += [_record(direction + FIRST, row.id, row.id, found, number) for number, row in enumerate(pairs.rows)]
    return records, [Measure(f"{direction}{FIRST}_r1", (direction + FIRST,), "recall", 1) for direction in DIRECTIONS]


def _official(pairs: Pairs, features: Features, data: TaskData) -> Scored:
    text_dtype = torch.float16 if features.encoder.has_frozen_text else torch.float32
    image_ND = torch.from_numpy(features.images(data.images)[pairs.image_N])
    first = [data.texts[texts[0]] for texts in pairs.text_N]
    text_ND = torch.from_numpy(features.aligned_texts(first)).to(text_dtype)
    records: list[Record] = []
    for direction in DIRECTIONS:
        query, gallery = (image_ND, text_ND) if direction == DIRECTIONS[0] else (text_ND, image_ND)
        right_N = official_top1(query, gallery)
        records += [
            Record(direction + FIRST, row.id, [], float(right), row.id)
            for row, right in zip(pairs.rows, right_N.tolist(), strict=True)
        ]
    return Scored(records, [Measure(f"{direction}{FIRST}_r1", (direction + FIRST,)) for direction in DIRECTIONS])


def official_top1(query_ND: torch.Tensor, key_ND: torch.Tensor) -> np.ndarray:
    """bool [N]: the script's top-1, right when query and key have the same position.

    As there, both sides are normalised in their own dtype, the query is then cast to the key's, and the softmax is taken before
    the top: in float16 that makes ties, which go to whichever comes first.
    """
    query_ND = query_ND / query_ND.norm(dim=-1, keepdim=True)
    key_ND = key_ND / key_ND.norm(dim=-1, keepdim=True)
    right = []
    for start in range(0, len(query_ND), 1024):
        similarity_BN = (100.0 * query_ND[start : start + 1024].to(key_ND.dtype) @ key_ND.T).softmax(dim=-1)
        top_B = similarity_BN.topk(1, dim=-1).indices[:, 0]
        right.append((top_B == torch.arange(start, start + len(top_B))).numpy())
    return np.concatenate(right)


def _record(subtask: str, identifier: str, cluster: str, found: Sequence[np.ndarray], number: int) -> Record:
    rank_N, tie_N, right_N, wrong_N = found
    rank = int(rank_N[number])
    scores = [float(right_N[number]), float(wrong_N[number])]
    return Record(subtask, identifier, scores, float(rank == 0), cluster, rank, bool(tie_N[number]))


def _array(numbers: set[int]) -> np.ndarray:
    return np.array(sorted(numbers), np.int64)


COCO = Task(partial(read_retrieval, "coco"), score_retrieval, "coco")
FLICKR30K = Task(partial(read_retrieval, "flickr30k"), score_retrieval, "flickr30k")
RETRIEVAL = Task(partial(read_retrieval, "retrieval"), score_retrieval, "retrieval")
