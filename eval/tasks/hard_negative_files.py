"""Hard-negative benchmarks in their published files: SugarCrepe++ (arXiv 2406.11171), ARO (arXiv 2210.01936) and Winoground
(arXiv 2204.03162). A path comes in, the contests of `eval.tasks.hard_negatives` go out; measures are those of the papers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.features import Features
from eval.images import Box
from eval.measures import Measure, Record
from eval.settings import HardNegativeData
from eval.tasks import Scored, Task, TaskData
from eval.tasks.hard_negatives import (
    Contest,
    by_id,
    choice,
    contests,
    open_images,
    present_files,
    read_entries,
    score_contests,
    texts_of,
)
from eval.tasks.word_order import PERTURBATIONS, Tagger, perturbed, spacy_tagger, words_of
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl, require_folder

PLUS_SUBTASKS = {
    "swap_obj": ("swap_obj", "swap_object"),
    "swap_att": ("swap_att", "swap_attribute"),
    "replace_obj": ("replace_obj", "replace_object"),
    "replace_att": ("replace_att", "replace_attribute"),
    "replace_rel": ("replace_rel", "replace_relation"),
}
"""Subtasks of SugarCrepe++ and the names of their files: the repository's, and those of the paper."""
PLUS_SCORES = ("itt", "tot")
ATTRIBUTE_PAIR_ITEMS = 25
"""ARO reports attribute pairs with at least as many items."""
WINOGROUND_SCORES = ("text", "image", "group")


def items_file(path: Path | None, name: str, task: str) -> Path:
    """The file with the items: what `--TASK.path` names, or the published file in that folder."""
    chosen = given(path, f"{task}.path")
    return chosen / name if chosen.is_dir() else chosen


def read_sugarcrepe_pp(settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """Those of the five SugarCrepe++ files that exist in the folder; two contests an item, `SUBTASK/itt` and `SUBTASK/tot`.

    Image-to-text: both captions are nearer to the image than the negative. Text-only: the captions are nearer to each other
    than either is to the negative.

    Raises:
        UserError: as `read_sugarcrepe`.
    """
    folder = require_folder(given(settings.path, "sugarcrepe_pp.path"), "a folder with SugarCrepe++ files")
    images, items = open_images(settings, folder, allow_missing, "sugarcrepe_pp"), []
    for subtask, file in present_files(folder, PLUS_SUBTASKS).items():
        for identifier, entry in read_entries(file).items():
            keys = ("filename", "caption", "caption2", "negative_caption")
            name, first, second, negative = texts_of(entry, keys, f"{file}: item {identifier}")
            if image := images.find(name, f"{subtask}/{identifier}"):
                to_image = ((image, first), (image, second), (image, negative))
                of_texts = ((first, second), (first, negative), (second, negative))
                both, one = ((0, 2), (1, 2)), ((0, 1), (0, 2))
                items.append(Contest(f"{subtask}/itt", identifier, to_image, both, image.name, shares_ties=False))
                items.append(Contest(f"{subtask}/tot", identifier, of_texts, one, image.name, shares_ties=False))
    return contests(items, images)


def score_sugarcrepe_pp(data: TaskData, features: Features) -> Scored:
    """Each score of each subtask, its mean over the subtasks, and over all items."""
    records = score_contests(data, features)
    found = {record.subtask for record in records}
    measures = []
    for score in PLUS_SCORES:
        names = tuple(f"{name}/{score}" for name in PLUS_SUBTASKS if f"{name}/{score}" in found)
        measures += [Measure(name, (name,)) for name in names]
        measures += [Measure(f"average/{score}", names, macro=True), Measure(f"all/{score}", names)]
    return Scored(records, measures)


def read_aro_relation(settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """visual_genome_relation.json; the subtask is the relation.

    Raises:
        UserError: a file of another form, an empty caption, a missing image unless allowed, a box outside its image.
    """
    return _read_visual_genome(settings, allow_missing, "aro_relation", "visual_genome_relation.json")


def read_aro_attribution(settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """visual_genome_attribution.json; the subtask is the pair of attributes, `FIRST_SECOND`. Raises as `read_aro_relation`."""
    return _read_visual_genome(settings, allow_missing, "aro_attribution", "visual_genome_attribution.json")


def _read_visual_genome(settings: HardNegativeData, allow_missing: bool, task: str, published: str) -> TaskData:
    file = items_file(settings.path, published, task)
    entries = read_entries(file)
    images, items = open_images(settings, file.parent, allow_missing, task), []
    for identifier, entry in entries.items():
        where = f"{file}: item {identifier}"
        name, *captions = texts_of(entry, ("image_path", "true_caption", "false_caption"), where)
        subtask = texts_of(entry, ("relation_name",), where)[0] if task == "aro_relation" else _attributes(entry, where)
        if image := images.find(name, f"{subtask}/{identifier}", _box(entry, where)):
            items.append(choice(subtask, identifier, image, captions))
    return contests(items, images)


def _attributes(entry: dict[str, Any], where: str) -> str:
    found = entry.get("attributes")
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(name, str) and name for name in found):
        raise UserError(f"{where}: expected two attributes under 'attributes', found {str(found)[:60]}.")
    return "_".join(found)


def _box(entry: dict[str, Any], where: str) -> Box:
    """What contains the objects that the captions are of; ARO shows the encoder nothing else."""
    values = []
    for key in ("bbox_x", "bbox_y", "bbox_w", "bbox_h"):
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**31:
            raise UserError(f"{where}: expected a number of pixels under '{key}', found {str(value)[:40]!r}.")
        values.append(value)
    left, upper, width, height = values
    return round(left), round(upper), round(left + width), round(upper + height)


@cache
def relations_left_out() -> frozenset[str]:
    """Relations that do not count in VG-Relation's published macro accuracy. ARO's notebook, which the list is from, calls them
    symmetric; by no means all of them are, but without the list its number cannot be had."""
    return frozenset(read_json(Path(__file__).with_name("aro_left_out_relations.json"))["relations"])


def score_aro_relation(data: TaskData, features: Features) -> Scored:
    """`macro`, the mean over the relations that ARO counts, as published; `all`, over the items of every relation."""
    records = score_contests(data, features)
    return _macro(records, lambda name, count: name not in relations_left_out())


def score_aro_attribution(data: TaskData, features: Features) -> Scored:
    """`macro`, the mean over the attribute pairs with at least 25 items, as published; `all`, over all items."""
    records = score_contests(data, features)
    return _macro(records, lambda name, count: count >= ATTRIBUTE_PAIR_ITEMS)


def _macro(records: list[Record], counts: Callable[[str, int], bool]) -> Scored:
    table = groups_table((record.subtask, record) for record in records)
    counted = tuple(name for name, row in table.items() if counts(name, row["n"]))
    for name, row in table.items():
        row["in macro"] = name in counted
    macro = [Measure("macro", counted, macro=True)] if counted else []
    return Scored(records, [*macro, Measure("all")], {"subtasks": table})


def groups_table(pairs: Iterable[tuple[str, Record]]) -> dict[str, dict[str, Any]]:
    """Accuracy and number of items of each group, by the group's name."""
    values: dict[str, list[float]] = {}
    for name, record in pairs:
        values.setdefault(name, []).append(record.correct)
    return {name: {"accuracy": float(np.mean(values[name])), "n": len(values[name])} for name in sorted(values)}


def read_order(task: str, published: str, settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """COCO-Order or Flickr30K-Order.

    Items have 'image' and a list 'caption', as in coco_karpathy_test.json: each caption is perturbed here. Or they have 'image'
    and 'caption_options', the true caption first, which is taken as it is.

    Raises:
        UserError: a file of another form, an empty caption, a missing image unless allowed, captions to perturb without spaCy.
    """
    file = items_file(settings.path, published, task)
    entries = read_entries(file)
    images, items, unchanged = open_images(settings, file.parent, allow_missing, task), [], Counter[str]()
    tagger: Tagger | None = None
    for identifier, entry in entries.items():
        where = f"{file}: item {identifier}"
        (name,) = texts_of(entry, ("image",), where)
        image = images.find(name, f"order/{identifier}")
        if image is None:
            continue
        if "caption_options" in entry:
            items.append(choice("order", identifier, image, _captions(entry, "caption_options", 2, where), official_tie=1.0))
            continue
        tagger = tagger or spacy_tagger(str(file))
        for number, caption in enumerate(_captions(entry, "caption", 1, where)):
            others = perturbed(caption, tagger)
            unchanged.update(set(PERTURBATIONS) - set(others))
            if others:
                candidates = (" ".join(words_of(caption)), *others.values())
                items.append(choice("order", f"{identifier}-{number}", image, candidates, official_tie=1.0))
    data = contests(items, images)
    data.notes |= {"captions that a perturbation leaves as they are": dict(unchanged)} if unchanged else {}
    return data


def _captions(entry: dict[str, Any], key: str, least: int, where: str) -> Sequence[str]:
    captions = entry.get(key)
    if not isinstance(captions, list) or len(captions) < least:
        raise UserError(f"{where}: expected a list of at least {least} captions under '{key}', found {str(captions)[:40]!r}.")
    for place, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{where}: expected a non-empty text at place {place} of '{key}', found {str(caption)[:40]!r}.")
    return captions


def score_order(data: TaskData, features: Features) -> Scored:
    """`accuracy`: the caption is nearer to the image than each of its perturbations (ARO's Precision@1)."""
    return Scored(score_contests(data, features), [Measure("accuracy")])


def read_winoground(settings: HardNegativeData, allow_missing: bool) -> TaskData:
    """examples.jsonl; three contests an example, whose subtasks are the scores `text`, `image` and `group`.

    Raises:
        UserError: a file of another form, an empty caption, an id that occurs twice, a missing image unless allowed.
    """
    file = items_file(settings.path, "examples.jsonl", "winoground")
    entries = by_id(read_jsonl(file, "Winoground's examples"), file)
    images, items = open_images(settings, file.parent, allow_missing, "winoground"), []
    for identifier, entry in entries.items():
        keys = ("image_0", "image_1", "caption_0", "caption_1")
        name_0, name_1, first, second = texts_of(entry, keys, f"{file}: item {identifier}")
        image_0, image_1 = (images.find(_with_suffix(name), identifier) for name in (name_0, name_1))
        if image_0 is None or image_1 is None:
            continue
        pairs = ((image_0, first), (image_1, second), (image_0, second), (image_1, first))
        for_image, for_caption = ((0, 2), (1, 3)), ((0, 3), (1, 2))
        wins = {"text": for_image, "image": for_caption, "group": for_image + for_caption}
        groups = _tags(entry)
        items += [
            Contest(score, identifier, pairs, wins[score], identifier, shares_ties=False, groups=groups)
            for score in WINOGROUND_SCORES
        ]
    images.missing = list(dict.fromkeys(images.missing))
    return contests(items, images)


def _with_suffix(name: str) -> str:
    """The published file leaves the suffix of its images out."""
    return name if Path(name).suffix else f"{name}.png"


def _tags(entry: dict[str, Any]) -> tuple[str, ...]:
    keys = ("collapsed_tag", "tag", "secondary_tag", "num_main_preds")
    return tuple(f"{key}: {entry[key]}" for key in keys if str(entry.get(key) or "").strip())


def score_winoground(data: TaskData, features: Features) -> Scored:
    """The three scores, and each of them for each tag."""
    records = score_contests(data, features)
    details = {}
    for score in WINOGROUND_SCORES:
        tagged = ((name, record) for item, record in zip(data.items, records, strict=True) for name in item.groups)
        details[score] = groups_table((name, record) for name, record in tagged if record.subtask == score)
    return Scored(records, [Measure(score, (score,)) for score in WINOGROUND_SCORES], details)


SUGARCREPE_PP = Task(read_sugarcrepe_pp, score_sugarcrepe_pp, "sugarcrepe_pp")
ARO_RELATION = Task(read_aro_relation, score_aro_relation, "aro_relation")
ARO_ATTRIBUTION = Task(read_aro_attribution, score_aro_attribution, "aro_attribution")
ARO_COCO_ORDER = Task(partial(read_order, "aro_coco_order", "coco_karpathy_test.json"), score_order, "aro_coco_order")
ARO_FLICKR_ORDER = Task(partial(read_order, "aro_flickr_order", "flickr30k_test.json"), score_order, "aro_flickr_order")
WINOGROUND = Task(read_winoground, score_winoground, "winoground")
