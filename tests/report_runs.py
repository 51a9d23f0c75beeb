"""Two runs of `lift-eval lmm` as folders on disk, made from a seed: questions of MMBench's categories, answers, thumbnails."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.records import RECORDS_FILE, Record, write_records
from lift.common.files import write_json

CATEGORIES = (
    ("perception", "coarse_perception", "image_scene"),
    ("perception", "coarse_perception", "image_style"),
    ("perception", "finegrained_perception (instance-level)", "attribute_recognition"),
    ("perception", "finegrained_perception (instance-level)", "object_localization"),
    ("perception", "finegrained_perception (cross-instance)", "spatial_relationship"),
    ("reasoning", "attribute_reasoning", "function_reasoning"),
    ("reasoning", "relation_reasoning", "social_relation"),
    ("reasoning", "logic_reasoning", "future_prediction"),
)
WORDS = ("red", "green", "blue", "round")


def thumbnail(seed: int, side: int = 48, quality: int = 80) -> tuple[str, bytes]:
    """SHA-256 and JPEG of a picture of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return hashlib.sha256(f"{seed}".encode()).hexdigest(), buffer.getvalue()


def circular_question(number: int, categories: tuple[str, str, str], images: Sequence[str], question: str) -> list[Record]:
    """Four passes without answers yet."""
    rows = []
    for rotation in range(4):
        options = dict(zip("ABCD", WORDS[rotation:] + WORDS[:rotation], strict=True))
        answer = next(letter for letter, word in options.items() if word == WORDS[number % 4])
        names = dict(zip(("l1", "l2", "l3"), categories, strict=True))
        key = str(number + rotation * 1_000_000)
        rows.append(
            Record("mmbench", key, str(number), rotation, names, question, options, [answer], "", None, 0.0, list(images))
        )
    return rows


def yes_no_question(number: int, images: Sequence[str], question: str) -> Record:
    answer = ("yes", "no")[number % 2]
    split = {"split": ("random", "popular", "adversarial")[number % 3]}
    return Record("pope", str(number), f"image {number // 6}", 0, split, question, {}, [answer], "", None, 0.0, list(images))


def answered(record: Record, right: bool) -> Record:
    """The record with a right answer, or a wrong one that the rule reads."""
    others = [letter for letter in record.options or ("yes", "no") if letter not in record.answer]
    said = record.answer[0] if right else others[0]
    values = record.to_dict() | {"response": said, "prediction": said, "score": float(right)}
    return Record.from_dict(values)


def write_run(folder: Path, records: Sequence[Record], thumbnails: Mapping[str, bytes] | None) -> Path:
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(record.task for record in records):
        of_task = [record for record in records if record.task == task]
        (folder / task).mkdir(parents=True)
        write_records(folder / task / RECORDS_FILE, of_task)
        if thumbnails is not None:
            with zipfile.ZipFile(folder / task / "thumbnails.zip", "w") as archive:
                for image in dict.fromkeys(image for record in of_task for image in record.images):
                    archive.writestr(f"{image}.jpg", thumbnails[image])
        tasks[task] = {
            "lmms_task": {"mmbench": "mmbench_en_dev_static"}.get(task, task),
            "data": f"data/{task}",
            "data_hash": hashlib.sha256(task.encode()).hexdigest(),
            "rows": len(of_task),
            "seconds": 12.5,
            "rows_per_second": len(of_task) / 12.5,
            "lmms_eval": None,
        }
    run = {
        "model": f"runs/llava_{folder.name}/stage2",
        "model_hash": hashlib.sha256(folder.name.encode()).hexdigest(),
        "gen": {"max_new_tokens": 16, "batch_size": 16, "dtype": "float32", "device": "cpu", "greedy": True},
        "versions": {"lmms-eval": "0.7.3", "transformers": "5.23.0", "torch": "2.13.0"},
        "command": "lmms-eval --model lift_llava",
        "seconds": 25.0,
        "tasks": tasks,
    }
    write_json(folder / "run.json", run)
    return folder
