"""MME (arXiv 2306.13394): two yes-or-no questions an image, in 10 perception and 4 cognition subtasks.

Both questions of an image share a group, from which accuracy+ (both right) and the published score are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import IMAGE_SUFFIXES, Published, Source, lines, with_images
from eval.lmm.tasks.rules import lmms_eval_module
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import require_folder, sha256_text

SUBTASKS = {
    "Perception": (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
"""Type -> its subtasks, by their published names."""

COLUMNS = dict.fromkeys(("question_id", "question", "answer", "category"), "string") | {"image": "image"}

_TYPE_OF_SUBTASK = {subtask: kind for kind, subtasks in SUBTASKS.items() for subtask in subtasks}


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    """The two questions of an image have one published id; the key adds eight digits of the question's hash."""
    read = lmms_eval_module("tasks/mme/utils.py").parse_pred_ans(response.strip())
    answer = doc["answer"].lower().strip().replace(".", "")
    levels = {"type": _TYPE_OF_SUBTASK.get(doc["category"]), "subtask": doc["category"]}
    return Record(
        task=task,
        key=f"{doc['question_id']} {sha256_text(doc['question'])[:8]}",
        group=doc["question_id"],
        rotation=0,
        categories={level: name for level, name in levels.items() if name},
        question=doc["question"],
        options={},
        answer=[answer],
        response=response,
        prediction=read if read in ("yes", "no") else None,
        score=float(read == answer),
        images=list(images),
    )


def letters(doc: Mapping[str, Any]) -> list[str]:
    return []


def read(lmms_task: str, source: Source) -> Published:
    """`MME_Benchmark_release_version`: a folder a subtask, with the texts beside the images or in `questions_answers_YN`."""
    if source.images is not None:
        raise UserError("--images: MME's images lie beside its questions; give the folder of both as the source only.")
    folder = require_folder(source.path, "the folder MME_Benchmark_release_version")
    places = ("", "MME_Benchmark", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")
    inner = [folder / place for place in places if _subtasks(folder / place)]
    if not inner:
        raise UserError(f"{folder}: expected MME's folders ({', '.join(_TYPE_OF_SUBTASK)}), found none of them.")
    absent = [name for name in _TYPE_OF_SUBTASK if name not in _subtasks(inner[0])]
    if absent and not source.allow_missing:
        raise UserError(
            f"{inner[0]}: expected a folder for each of MME's 14 subtasks, found none for {', '.join(absent)}. "
            f"Add them, or evaluate without them with --allow_missing."
        )
    rows = [row for name in _subtasks(inner[0]) for row in _rows(inner[0] / name)]
    rows, left_out = with_images(rows, "question_id", source)
    left_out += [f"Left out: the subtasks {', '.join(absent)}, which have no folder."] if absent else []
    return Published([Table(task_source(lmms_task), COLUMNS, rows)], left_out)


def _subtasks(folder: Path) -> list[str]:
    return [name for name in _TYPE_OF_SUBTASK if (folder / name).is_dir()]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
    images = folder / "images" if (folder / "images").is_dir() else folder
    paths = sorted(texts.glob("*.txt"))
    if not paths:
        raise UserError(f"{texts}: expected MME's questions as .txt files, found none.")
    for path in paths:
        candidates = [images / f"{path.stem}{suffix}" for suffix in IMAGE_SUFFIXES]
        image = next((each for each in candidates if each.is_file()), candidates[0])
        questions = lines(path, "MME's questions on an image")
        if len(questions) != 2 or questions[0] == questions[1]:
            raise UserError(f"{path}: expected two questions, which MME scores together, found {len(set(questions))}.")
        for number, line in enumerate(questions, start=1):
            question, _, answer = line.rpartition("\t")
            if not question.strip() or answer.strip().lower() not in ("yes", "no"):
                raise UserError(f"{path}:{number}: expected a question, a tab, and Yes or No, found '{line}'.")
            yield {
                "question_id": f"{folder.name}/{image.name}",
                "question": question.strip(),
                "answer": answer.strip(),
                "category": folder.name,
                "image": image,
            }
