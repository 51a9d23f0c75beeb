"""TextVQA (arXiv 1904.08920), validation: the text in a photo, scored by VQA accuracy over ten human answers.

Rows have no category. The published `image_classes` are several detected classes a photo in no order: a photo counts in many
of them, so that differences per class would share rows, and no one of them stands for the question.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import Published, Source, image_path, objects, refuse_duplicates, text, texts, with_images
from eval.lmm.tasks.rules import lmms_eval_module
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import read_json

COLUMNS = {
    "image_id": "string",
    "question_id": "int32",
    "question": "string",
    "question_tokens": ["string"],
    "image": "image",
    "image_width": "int32",
    "image_height": "int32",
    "flickr_original_url": "string",
    "flickr_300k_url": "string",
    "answers": ["string"],
    "image_classes": ["string"],
    "set_name": "string",
    "ocr_tokens": ["string"],
}


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    """The answer is right in part when fewer than three of the others than a left-out annotator gave it."""
    process = lmms_eval_module("tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    prediction = process(response.strip())
    answers = [process(answer) for answer in doc["answers"]]
    agreeing = answers.count(prediction)
    return Record(
        task=task,
        key=str(doc["question_id"]),
        group=doc["image_id"],
        rotation=0,
        categories={},
        question=doc["question"],
        options={},
        answer=list(doc["answers"]),
        response=response,
        prediction=prediction or None,
        score=statistics.mean(min(1.0, (agreeing - (answer == prediction)) / 3) for answer in answers),
        images=list(images),
    )


def letters(doc: Mapping[str, Any]) -> list[str]:
    return []


def read(lmms_task: str, source: Source) -> Published:
    """`TextVQA_0.5.1_val.json` and `train_images/IMAGE_ID.jpg` (of train_val_images.zip).

    lmms-eval's task asks without OCR tokens, so that column is empty.
    """
    path = source.file("TextVQA's questions", "TextVQA_0.5.1_val.json")
    values = read_json(path, "TextVQA's questions")
    questions = objects(values.get("data") if isinstance(values, dict) else None, path, "TextVQA's questions")
    folder = source.image_folder("train_images", "train_val_images/train_images", "images")
    rows = []
    for question in questions:
        where = f"{path}: question {question.get('question_id')}"
        if not isinstance(question.get("question_id"), int):
            raise UserError(f"{where}: expected a number as question_id.")
        image_id = text(question, "image_id", where)
        row = {name: question.get(name) for name in COLUMNS}
        row |= {"image_id": image_id, "question": text(question, "question", where)}
        row |= {"answers": texts(question, "answers", where, least=2), "ocr_tokens": []}
        row["image"] = image_path(folder, f"{image_id}.jpg", where)
        rows.append(row)
    refuse_duplicates(rows, "question_id", path)
    rows, left_out = with_images(rows, "question_id", source)
    return Published([Table(task_source(lmms_task), COLUMNS, rows)], left_out)
