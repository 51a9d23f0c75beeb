"""GQA (arXiv 1902.09506), testdev_balanced: a word or phrase, right when equal to the answer but for case and punctuation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.lmm.tasks.dataset import Table, TaskSource, task_source
from eval.lmm.tasks.published import Published, Source, image_path, text, with_images
from eval.lmm.tasks.rules import exact_match_form
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import read_json

LEVELS = ("structural", "semantic", "detailed")
"""Question types, from coarse to fine: verify, query, ...; object, attribute, relation, ...; and their hundred-odd kinds."""

_IMAGES_CONFIG = "testdev_balanced_images"
"""Of the second data set that lmms-eval's task loads, by a name in its code."""
_GROUPS = {"global": "string", "local": "string"}
_OPERATION = {"argument": "string", "dependencies": ["int32"], "operation": "string"}
_ANNOTATED = ("answer", "fullAnswer", "question")
_OBJECTS = [{"objectId": "string", "value": "string"}]
COLUMNS = {
    **dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), "string"),
    "isBalanced": "bool",
    "groups": _GROUPS,
    "entailed": "string",
    "equivalent": "string",
    "types": dict.fromkeys(("detailed", "semantic", "structural"), "string"),
    "annotations": dict.fromkeys(_ANNOTATED, _OBJECTS),
    "semantic": [_OPERATION],
    "semanticStr": "string",
}


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    prediction = exact_match_form(response)
    types = doc["types"] or {}
    return Record(
        task=task,
        key=doc["id"],
        group=doc["imageId"],
        rotation=0,
        categories={level: types[level] for level in LEVELS if types.get(level)},
        question=doc["question"],
        options={},
        answer=[doc["answer"]],
        response=response,
        prediction=prediction or None,
        score=float(prediction == exact_match_form(doc["answer"])),
        images=list(images),
    )


def letters(doc: Mapping[str, Any]) -> list[str]:
    return []


def read(lmms_task: str, source: Source) -> Published:
    """`testdev_balanced_questions.json` (of questions1.2.zip) and `images/IMAGE_ID.jpg` (of images.zip)."""
    name = "testdev_balanced_questions.json"
    path = source.file("GQA's questions", name, f"questions1.2/{name}", f"questions/{name}")
    # LLaVA's file is JSON lines, and without answers
    questions = {} if path.suffix == ".jsonl" else read_json(path, "GQA's questions")
    if not isinstance(questions, dict) or not questions or not all(isinstance(each, dict) for each in questions.values()):
        raise UserError(
            f"{path}: expected {name} of GQA, an object of one object a question id, found another form. "
            f"LLaVA's llava_gqa_testdev_balanced.jsonl has no answers: take GQA's own file."
        )
    folder = source.image_folder("images", "../images")
    rows = [_row(key, values, f"{path}: question {key}") for key, values in questions.items()]
    for row in rows:
        row["image"] = image_path(folder, f"{row['imageId']}.jpg", f"{path}: question {row['id']}")
    rows, left_out = with_images(rows, "id", source)
    images = {row["imageId"]: {"id": row["imageId"], "image": row["image"]} for row in rows}
    where = task_source(lmms_task)
    of_images = TaskSource(where.repository, _IMAGES_CONFIG, where.split)
    tables = [Table(where, COLUMNS, rows), Table(of_images, {"id": "string", "image": "image"}, images.values())]
    return Published(tables, left_out)


def _row(key: str, values: dict[str, Any], where: str) -> dict[str, Any]:
    row = {name: text(values, name, where) for name in ("imageId", "question", "answer")}
    types = values.get("types")
    if not isinstance(types, dict):
        raise UserError(f"{where}: expected the question's types under 'types', found {types!r}.")
    annotations, operations = _part(values, "annotations", dict, where), _part(values, "semantic", list, where)
    if not all(isinstance(each, dict) for each in operations):
        raise UserError(f"{where}: expected a list of objects under 'semantic', found {operations!r}.")
    return row | {
        "id": key,
        "fullAnswer": values.get("fullAnswer"),
        "isBalanced": values.get("isBalanced"),
        "groups": _chosen(_part(values, "groups", dict, where), _GROUPS),
        "entailed": json.dumps(values.get("entailed") or []),
        "equivalent": json.dumps(values.get("equivalent") or []),
        "types": {level: text(types, level, where) for level in LEVELS},
        "annotations": {name: _pairs(_part(annotations, name, dict, where)) for name in _ANNOTATED},
        "semantic": [_chosen(each, _OPERATION) for each in operations],
        "semanticStr": values.get("semanticStr"),
    }


def _part(values: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """The object or list under `key`, empty when there is none. Raises UserError when it is anything else."""
    part = values.get(key) or kind()
    if not isinstance(part, kind):
        raise UserError(f"{where}: expected {'an object' if kind is dict else 'a list'} under '{key}', found {part!r}.")
    return part


def _chosen(values: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values.get(name) for name in names}


def _pairs(objects: Mapping[str, Any]) -> list[dict[str, str]]:
    """GQA's {place in the text: object id} as the published data set lists it."""
    return [{"objectId": place, "value": str(value)} for place, value in objects.items()]
