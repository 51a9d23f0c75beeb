"""AI2D (arXiv 1603.07396), test: questions on science diagrams, right when the answer is the letter, or begins `LETTER.`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import (
    Published,
    Source,
    image_path,
    lines,
    option_number,
    refuse_duplicates,
    text,
    texts,
    with_images,
)
from eval.lmm.tasks.rules import exact_match_form, lettered
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import read_json, require_folder

# The published data set has neither id nor category: the last two are ours, and a row without them is still taken.
COLUMNS = {
    "question": "string",
    "options": ["string"],
    "answer": "string",
    "image": "image",
    "question_id": "string",
    "category": "string",
}

_FIRST_LETTER = re.compile(r"^\s*([A-Z])\.")


def letters(doc: Mapping[str, Any]) -> list[str]:
    return list(lettered(doc["options"]))


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    """Rows of the published data set have no id: their key is a hash of what is asked, their group the image's hash."""
    options = lettered(doc["options"])
    answer = list(options)[int(doc["answer"])]
    match = _FIRST_LETTER.match(response)
    read = exact_match_form(match[1] if match else response).upper()
    asked = json.dumps([doc["question"], doc["options"], list(images)], ensure_ascii=False)
    key = doc.get("question_id") or hashlib.sha256(asked.encode()).hexdigest()[:16]
    return Record(
        task=task,
        key=key,
        group=doc["question_id"].rpartition("-")[0] if doc.get("question_id") else (images[0] if images else key),
        rotation=0,
        categories={"category": doc["category"]} if doc.get("category") else {},
        question=doc["question"],
        options=options,
        answer=[answer],
        response=response,
        prediction=read if read in options else None,
        score=float(read == answer),
        images=list(images),
    )


def read(lmms_task: str, source: Source) -> Published:
    """The folder `ai2d`: `questions/*.json`, `images`, `abc_images`, `categories.json`; in or beside it `ai2d_test_ids.csv`.

    Questions on the letters of a diagram (`abcLabel`) are asked with the diagram of `abc_images`, on which the letters
    stand in the place of the names.
    """
    folder = require_folder(source.path, "the folder ai2d")
    if source.images is not None:
        raise UserError("--images: AI2D's images lie beside its questions; give the folder of both as the source only.")
    tests = _test_ids(source)
    categories = read_json(folder / "categories.json", "AI2D's categories of images")
    if not isinstance(categories, dict):
        raise UserError(f"{folder}/categories.json: expected an object, image name to category, found another form.")
    paths = sorted(require_folder(folder / "questions", "AI2D's questions").glob("*.json"), key=lambda path: path.name)
    rows, left_out = [], 0
    for path in paths:
        values = read_json(path, "AI2D's questions of an image")
        if not isinstance(values, dict) or not isinstance(values.get("questions"), dict):
            raise UserError(f"{path}: expected an object with 'imageName' and 'questions', found another form.")
        name = text(values, "imageName", str(path))
        if name.removesuffix(".png") not in tests:
            left_out += len(values["questions"])
            continue
        rows += [
            _row(folder, name, categories.get(name), question, each, path) for question, each in values["questions"].items()
        ]
    if not rows:
        raise UserError(f"{folder}/questions: expected questions on the test images, found none in {len(paths)} files.")
    refuse_duplicates(rows, "question_id", folder / "questions")
    rows, told = with_images(rows, "question_id", source)
    told += [f"Left out: {left_out} questions on images that are not in ai2d_test_ids.csv."] if left_out else []
    return Published([Table(task_source(lmms_task), COLUMNS, rows)], told)


def _test_ids(source: Source) -> set[str]:
    name = "ai2d_test_ids.csv"
    path = next((each for each in (source.path / name, source.path.parent / name) if each.is_file()), None)
    if path is None:
        raise UserError(
            f"{source.path}: expected {name} in it or beside it, AI2D's list of test images (one id a line); "
            f"without it questions of the training part would be asked."
        )
    return {line.strip().removesuffix(".png") for line in lines(path, "AI2D's list of test images")}


def _row(folder: Path, name: str, category: Any, question: str, values: Any, path: Path) -> dict[str, Any]:
    where = f"{path}: '{question}'"
    if not isinstance(values, dict) or not question.strip():
        raise UserError(f"{where}: expected a question with its options, found another form.")
    options = texts(values, "answerTexts", where, least=2)
    return {
        "question": question,
        "options": options,
        "answer": str(option_number(values, "correctAnswer", options, where)),
        "image": image_path(folder / ("abc_images" if values.get("abcLabel") else "images"), name, where),
        "question_id": text(values, "questionId", where),
        "category": category if isinstance(category, str) else None,
    }
