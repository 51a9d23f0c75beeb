"""ScienceQA (arXiv 2209.09513), test: school questions with or without an image, right when the answer is the letter.

`scienceqa` asks all questions, `scienceqa_img` those with an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import Published, Source, image_path, option_number, text, texts, with_images
from eval.lmm.tasks.rules import lettered
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import read_json, require_folder

_TEXTS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
# The published data set has no id: the last one is ours, and a row without it is still taken.
COLUMNS = {"image": "image", "question": "string", "choices": ["string"], "answer": "int8"} | dict.fromkeys(
    (*_TEXTS, "id"), "string"
)


def letters(doc: Mapping[str, Any]) -> list[str]:
    return list(lettered(doc["choices"]))


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    """Categories are those of the paper's table: context modality, grade band, subject; and the finer topic and category.

    Rows of the published data set have no id: their key is a hash of what is asked.
    """
    options = lettered(doc["choices"])
    answer = list(options)[int(doc["answer"])]
    hint = doc.get("hint") or ""
    asked = json.dumps([hint, doc["question"], doc["choices"], doc.get("solution"), list(images)], ensure_ascii=False)
    key = doc.get("id") or hashlib.sha256(asked.encode()).hexdigest()[:16]
    prediction = _letter(response, options)
    return Record(
        task=task,
        key=key,
        group=images[0] if images else key,
        rotation=0,
        categories=_categories(doc, hint, bool(images)),
        question=f"{hint}\n{doc['question']}" if hint else doc["question"],
        options=options,
        answer=[answer],
        response=response,
        prediction=prediction,
        score=float(prediction == answer),
        images=list(images),
    )


def _letter(response: str, options: Mapping[str, str]) -> str | None:
    answer = response.strip()
    if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
        answer = answer[0]
    return answer.upper() if len(answer) == 1 and answer.upper() in options else None


def _categories(doc: Mapping[str, Any], hint: str, has_image: bool) -> dict[str, str]:
    contexts = [name for name, is_there in (("image", has_image), ("text", bool(hint))) if is_there]
    grade = str(doc.get("grade") or "").removeprefix("grade")
    band = ("G1-6" if int(grade) <= 6 else "G7-12") if grade.isdigit() else None
    levels = {"modality": " and ".join(contexts) or "no context", "grade": band}
    levels |= {level: doc.get(level) for level in ("subject", "topic", "category")}
    return {level: name for level, name in levels.items() if name}


def read(lmms_task: str, source: Source) -> Published:
    """`problems.json`, `pid_splits.json` and `images/test/ID/image.png` of the published folder."""
    folder = require_folder(source.path, "the folder of ScienceQA")
    path = source.file("ScienceQA's problems", "problems.json", "data/scienceqa/problems.json")
    problems = read_json(path, "ScienceQA's problems")
    splits = read_json(path.with_name("pid_splits.json"), "ScienceQA's lists of problems")
    if not isinstance(problems, dict) or not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
        raise UserError(f"{path}: expected one object a problem, and a list 'test' in pid_splits.json, found another form.")
    ids = [str(each) for each in splits["test"]]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path.with_name('pid_splits.json')}: expected each problem once in 'test', found one twice.")
    if unknown := [each for each in ids if not isinstance(problems.get(each), dict)]:
        raise UserError(f"{path}: expected problem {unknown[0]}, which pid_splits.json lists in 'test', but it is not there.")
    with_image = [each for each in ids if problems[each].get("image")]
    chosen = with_image if lmms_task == "scienceqa_img" else ids
    if not chosen:
        raise UserError(f"{path}: expected problems to ask, found none among {len(ids)} of the test part.")
    images = None
    if with_image:
        images = Source(path, source.images).image_folder("images/test", "test", "images")
    rows = []
    for each in chosen:
        row = _row(each, problems[each], f"{path}: problem {each}")
        if images is not None and problems[each].get("image"):
            row["image"] = image_path(images, f"{each}/{problems[each]['image']}", f"{path}: problem {each}")
        rows.append(row)
    rows, left_out = with_images(rows, "id", Source(folder, source.images, source.allow_missing))
    if len(chosen) < len(ids):
        left_out.append(f"Left out: {len(ids) - len(chosen)} questions without an image; the task scienceqa asks them.")
    return Published([Table(task_source(lmms_task), COLUMNS, rows)], left_out)


def _row(key: str, problem: Mapping[str, Any], where: str) -> dict[str, Any]:
    choices = texts(problem, "choices", where, least=2)
    row = {name: problem.get(name) or "" for name in _TEXTS}
    row |= {"id": key, "question": text(problem, "question", where), "choices": choices, "image": None}
    return row | {"answer": option_number(problem, "answer", choices, where)}
