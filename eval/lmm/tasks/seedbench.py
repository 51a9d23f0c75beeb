"""SEED-Bench (arXiv 2307.16125), the image part: four options, right when the answer's first character is the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import Published, Source, image_path, objects, refuse_duplicates, text, with_images
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import read_json

QUESTION_TYPES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
    "Action Recognition",
    "Action Prediction",
    "Procedure Understanding",
)
"""Published names by `question_type_id`, from 1; the last three are of videos."""

_TEXTS = ("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type", "question", "question_id")
COLUMNS = dict.fromkeys(_TEXTS, "string") | {"question_type_id": "int16", "image": ["image"], "segment": ["int64"]}


def options(doc: Mapping[str, Any]) -> dict[str, str]:
    return {letter: doc[f"choice_{letter.lower()}"] for letter in "ABCD"}


def letters(doc: Mapping[str, Any]) -> list[str]:
    return list(options(doc))


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    read = response.strip()[:1].upper()
    kind = int(doc["question_type_id"])
    name = QUESTION_TYPES[kind - 1] if 1 <= kind <= len(QUESTION_TYPES) else str(kind)
    return Record(
        task=task,
        key=str(doc["question_id"]),
        group=str(doc["data_id"]),
        rotation=0,
        categories={"data_type": doc["data_type"], "question_type": name},
        question=doc["question"],
        options=options(doc),
        answer=[doc["answer"]],
        response=response,
        prediction=read if read in options(doc) else None,
        score=float(read == doc["answer"].strip().upper()),
        images=list(images),
    )


def read(lmms_task: str, source: Source) -> Published:
    """`SEED-Bench.json` and `SEED-Bench-image/DATA_ID`; questions on videos are left out and counted."""
    path = source.file("SEED-Bench's questions", "SEED-Bench.json")
    values = read_json(path, "SEED-Bench's questions")
    questions = objects(values.get("questions") if isinstance(values, dict) else None, path, "SEED-Bench's questions")
    of_images = [each for each in questions if each.get("data_type") == "image"]
    other = len(questions) - sum(each.get("data_type") in ("image", "video") for each in questions)
    if other:
        raise UserError(f"{path}: expected data_type image or video (SEED-Bench-1), found another in {other} questions.")
    if not of_images:
        raise UserError(f"{path}: expected questions on images, found none among {len(questions)}.")
    folder = source.image_folder("SEED-Bench-image", "images")
    rows = [_row(each, f"{path}: question {each.get('question_id')}") for each in of_images]
    refuse_duplicates(rows, "question_id", path)
    for row in rows:
        row["file"] = image_path(folder, row["data_id"], f"{path}: question {row['question_id']}")
        row["image"] = [row["file"]]
    rows, left_out = with_images(rows, "question_id", source, "file")
    videos = len(questions) - len(of_images)
    left_out += [f"Left out: {videos} questions on videos, which LLaVA does not take."] if videos else []
    return Published([Table(task_source(lmms_task), COLUMNS, rows)], left_out)


def _row(question: Mapping[str, Any], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: text(question, name, where) for name in _TEXTS}
    if row["answer"] not in options(row):
        raise UserError(f"{where}: answer '{row['answer']}' names no option; they are A, B, C, D.")
    kind = question.get("question_type_id")
    if not isinstance(kind, int) or not 1 <= kind <= len(QUESTION_TYPES):
        raise UserError(f"{where}: expected a question_type_id from 1 to {len(QUESTION_TYPES)}, found {kind!r}.")
    return row | {"question_type_id": kind}
