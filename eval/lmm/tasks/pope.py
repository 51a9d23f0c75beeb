"""POPE (arXiv 2305.10355): is there such an object in the COCO image? Right when the whole answer is the word yes or no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import Published, Source, objects, refuse_duplicates, text, with_images
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import read_jsonl

SPLITS = ("random", "popular", "adversarial")
COLUMNS = dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), "string") | {
    "image": "image",
    "category": "string",
}


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    prediction, answer = response.lower().strip(), doc["answer"].lower().strip()
    return Record(
        task=task,
        key=f"{doc['category']}/{doc['question_id']}",
        group=doc["image_source"],
        rotation=0,
        categories={"split": doc["category"]},
        question=doc["question"],
        options={},
        answer=[answer],
        response=response,
        prediction=prediction if prediction in ("yes", "no") else None,
        score=float(prediction == answer),
        images=list(images),
    )


def letters(doc: Mapping[str, Any]) -> list[str]:
    return []


def read(lmms_task: str, source: Source) -> Published:
    """`coco_pope_{random,popular,adversarial}.json` (JSON lines), or one of them, and COCO's val2014 images.

    An image `COCO_val2014_000000000042.jpg` may also have the name `000000000042.jpg` that COCO 2017 gave it, and lie in
    a folder inside the one given (`val2017` and `train2017`).
    """
    if source.path.is_file():
        paths = [source.path]
    else:
        names = [f"coco_pope_{split}.json" for split in SPLITS]
        paths = [
            source.file("POPE's questions", *(f"{place}{name}" for place in ("", "coco/", "output/coco/"))) for name in names
        ]
    folder = source.image_folder("val2014", "images", "coco/val2014", "../val2014")
    files = {path.name: path for path in [*folder.glob("*.jpg"), *folder.glob("*/*.jpg")]}
    rows = [row for path in paths for row in _rows(path, folder, files)]
    for place, row in enumerate(rows):
        row["id"] = str(place)
    rows, left_out = with_images(rows, "key", source)
    return Published([Table(task_source(lmms_task), COLUMNS, rows)], left_out)


def _rows(path: Path, folder: Path, files: Mapping[str, Path]) -> list[dict[str, Any]]:
    split = path.stem.rpartition("_")[2]
    if split not in SPLITS:
        raise UserError(f"{path}: expected a name that ends with {', '.join(SPLITS)}, such as coco_pope_random.json.")
    rows = []
    for number, question in enumerate(objects(read_jsonl(path, "POPE's questions"), path, "POPE's questions"), start=1):
        where = f"{path}:{number}"
        values = {name: text(question, name, where) for name in ("question_id", "image", "text", "label")}
        if values["label"] not in ("yes", "no"):
            raise UserError(f"{where}: expected the label yes or no, found '{values['label']}'.")
        name, of_2017 = values["image"], values["image"].removeprefix("COCO_val2014_")
        rows.append(
            {
                "key": f"{split}/{values['question_id']}",
                "question_id": values["question_id"],
                "question": values["text"],
                "answer": values["label"],
                "image_source": Path(name).stem,
                "image": files.get(name) or files.get(of_2017) or folder / Path(name).name,
                "category": split,
            }
        )
    refuse_duplicates(rows, "key", path)
    return rows
