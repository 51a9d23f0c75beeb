"""Small samples of LMM benchmarks in their published layouts, with the oddities of the real ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tiny import encoded, noise_image


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(noise_image(seed)))
    return path


def gqa(folder: Path) -> Path:
    def question(image_id: str, text: str, answer: str, detailed: str, **extra: Any) -> dict[str, Any]:
        types = {"structural": "query", "semantic": "attr", "detailed": detailed}
        return {"imageId": image_id, "question": text, "answer": answer, "types": types, "isBalanced": True} | extra

    questions = {
        "201307251": question(
            "n161313",
            "Is it overcast?",
            "no",
            "weatherVerify",
            fullAnswer="No, it is clear.",
            groups={"global": None, "local": "13-weather"},
            entailed=["201307252"],
            equivalent=["201307251"],
            annotations={"answer": {}, "question": {"2": "880310"}, "fullAnswer": {"0:2": "880310"}},
            semantic=[{"operation": "select", "argument": "scene", "dependencies": []}],
            semanticStr="select: scene",
        ),
        "202225914": question("n161313", "Who is wearing a T-shirt?", "t-shirt", "categoryRelS"),
        "20602949": question("n235859", "What’s on the right?", "girl", "objThisChoose"),
    }
    for seed, name in enumerate(("n161313", "n235859")):
        image(folder / "images" / f"{name}.jpg", seed)
    write(folder / "testdev_balanced_questions.json", questions)
    return folder


def pope(folder: Path) -> Path:
    for split, label in (("random", "no"), ("popular", "yes"), ("adversarial", "no")):
        names = ["COCO_val2014_000000310196.jpg", "COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg"]
        rows = [
            {"question_id": 1 + place, "image": name, "text": f"Is there a {split} {place} in the image?", "label": label}
            for place, name in enumerate(names)
        ]
        path = folder / f"coco_pope_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    image(folder / "val2014" / "COCO_val2014_000000310196.jpg", 10)
    image(folder / "val2014" / "000000210789.jpg", 11)  # named as COCO 2017 does
    return folder


MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(folder: Path) -> Path:
    for seed, name in enumerate((*MME_PERCEPTION, *MME_COGNITION)):
        apart = name in ("artwork", "celebrity", "landmark", "posters", "scene")
        texts = folder / name / "questions_answers_YN" if apart else folder / name
        texts.mkdir(parents=True)
        questions = [f"Is it {name}? Please answer yes or no.\tYes", f"Is it not {name}? Please answer yes or no.\tNo"]
        (texts / "0001.txt").write_text("\n".join(questions) + "\n\n")
        image((folder / name / "images" if apart else folder / name) / ("0001.jpg" if apart else "0001.png"), 20 + seed)
    return folder


def seedbench(folder: Path) -> Path:
    def question(key: str, kind: int, answer: str, data_type: str = "image", **extra: Any) -> dict[str, Any]:
        choices = {f"choice_{letter}": f"{letter} of {key}" for letter in "abcd"}
        row = {"question_id": key, "question": f"How many ({key})?", "question_type_id": kind, "answer": answer}
        return row | choices | {"data_id": f"1454426_{key}", "data_type": data_type} | extra

    rows = [question("101669", 5, "A"), question("101670", 9, "D"), question("v1962", 11, "B", "video", segment=[648.0, 658.0])]
    for seed, row in enumerate(rows[:2]):
        image(folder / "SEED-Bench-image" / row["data_id"], 40 + seed)  # the published files have no suffix
    write(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Instances Counting": 5}})
    return folder


def textvqa(folder: Path) -> Path:
    def question(key: int, image_id: str, text: str, answers: list[str]) -> dict[str, Any]:
        row = {"question_id": key, "image_id": image_id, "question": text, "answers": answers, "set_name": "val"}
        return row | {
            "image_classes": ["Vehicle", "Tower"],
            "flickr_original_url": "https://example.org/a.jpg",
            "flickr_300k_url": "https://example.org/b.jpg",
            "image_width": 1024,
            "image_height": 730,
            "question_tokens": text.split(),
        }

    rows = [
        question(34602, "003a8ae2ef43b901", "what is the brand of this camera?", ["nous les gosses"] + ["dakota"] * 9),
        question(34603, "003a8ae2ef43b901", "what is the time?", ["12:30"] * 2 + ["the 12:30"] + ["two"] * 3 + ["2"] * 4),
    ]
    image(folder / "train_images" / "003a8ae2ef43b901.jpg", 50)
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    return folder


def ai2d(folder: Path) -> Path:
    def questions(name: str, **texts: Any) -> None:
        write(folder / "questions" / f"{name}.json", {"imageName": name, "questions": texts})

    def question(key: str, options: list[str], answer: int, abc: bool) -> dict[str, Any]:
        return {"questionId": key, "answerTexts": options, "correctAnswer": answer, "abcLabel": abc}

    questions(
        "0.png",
        **{
            "What is A in the diagram?": question("0.png-0", ["ears", "nose", "mouth", "face"], 3, True),
            "What do rabbits eat?": question("0.png-1", ["grass", "None"], 0, False),
        },
    )
    questions("1.png", **{"Of the training part?": question("1.png-0", ["yes", "no"], 0, False)})
    for seed, name in enumerate(("images/0.png", "abc_images/0.png", "images/1.png")):
        image(folder / name, 60 + seed)
    write(folder / "categories.json", {"0.png": "partsOfA", "1.png": "foodChainsWebs"})
    (folder / "ai2d_test_ids.csv").write_text("0\n17\n")
    return folder


def scienceqa(folder: Path) -> Path:
    def problem(question: str, choices: list[str], answer: int, **extra: Any) -> dict[str, Any]:
        levels = {"grade": "grade2", "subject": "natural science", "topic": "physics", "category": "Magnets", "split": "test"}
        return {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": "",
            "image": None,
            "task": "closed choice",
        } | (levels | {"skill": "s", "lecture": "l", "solution": ""} | extra)

    problems = {
        "4": problem("Which is warm?", ["a bowl", "an oven"], 1, hint="Two things.", grade="grade8"),
        "5": problem("Which attract?", ["these", "none", "both"], 0, image="image.png", hint="Look."),
        "11": problem("Which word?", ["one", "two"], 0),
        "13": problem("Which attract?", ["these", "none"], 1, image="image.png"),
        "99": problem("Not of the test part", ["a", "b"], 0, split="train"),
    }
    for seed, key in enumerate(("5", "13")):
        image(folder / "images" / "test" / key / "image.png", 70 + seed)
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["99"], "test": ["4", "5", "11", "13"]})
    return folder


def mmbench(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mmbench.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "mmbench.tsv"
