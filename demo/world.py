"""The demo world on disk, in the formats that real data has, so that every later stage is the one users run.

A size and a seed come in; out come webdataset tars, SugarCrepe files, LLaVA JSON, an MMBench TSV and the language model's
texts. Each split draws its scenes from its own seed.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from demo.hard_negatives import KINDS, hard_negative
from demo.questions import CATEGORY_COLUMNS, LETTERS, TEMPLATES, Question, balanced_questions
from demo.scene import Scene, long_caption, random_scene, render, short_caption
from demo.settings import IMAGE_SIZE, SIZES, Size, WorldSettings
from lift.common.files import atomic_folder, check_output_folder, read_json, write_json, write_jsonl

FORMAT = 1
"""Raise it when the same settings give another world."""
PAIRS_PER_TAR = 1024
QUESTIONS_PER_CONVERSATION = 3
ROTATION_STRIDE = 1_000_000


def write_world(settings: WorldSettings) -> None:
    """Writes the folder, or leaves it when it holds this world already."""
    stamp = {"format": FORMAT, "seed": settings.seed, "image_size": IMAGE_SIZE, **asdict(SIZES[settings.size])}
    if (settings.out / "world.json").is_file() and read_json(settings.out / "world.json") == stamp:
        print(f"{settings.out}: the demo world is there, reused")
        return
    check_output_folder(settings.out, "world.json")
    size = SIZES[settings.size]
    with atomic_folder(settings.out) as folder, tqdm(total=_images(size), desc="render world", unit="image") as progress:
        artist = _Artist(settings.seed, progress)
        _write_pairs(folder / "pairs" / "train", size.train_pairs, artist.split("train pairs"), artist)
        _write_pairs(folder / "pairs" / "held_out", size.held_out_pairs, artist.split("held-out pairs"), artist)
        _write_hard_negatives(folder / "sugar_crepe", size.hard_negatives, artist.split("hard negatives"), artist)
        _write_captions(folder / "llava", size.captioned_images, artist.split("captions"), artist)
        _write_conversations(folder / "llava", size.conversations, artist.split("conversations"), artist)
        _write_questions(folder / "mmbench.tsv", size.question_groups, artist.split("questions"), artist)
        texts = tqdm(_texts(size.texts, artist.split("texts")), desc="write texts", total=size.texts, unit="text")
        write_jsonl(folder / "texts.jsonl", texts)
        write_json(folder / "world.json", stamp)


class _Artist:
    """Renders and counts; one random generator for each split, so that no split depends on the size of another."""

    def __init__(self, seed: int, progress: tqdm) -> None:
        self.seed, self.progress = seed, progress

    def split(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])

    def png(self, scene: Scene) -> bytes:
        buffer = io.BytesIO()
        render(scene, IMAGE_SIZE).save(buffer, "PNG", compress_level=1)
        self.progress.update()
        return buffer.getvalue()


def _images(size: Size) -> int:
    pairs, negatives = size.train_pairs + size.held_out_pairs, len(KINDS) * size.hard_negatives
    return pairs + negatives + size.captioned_images + size.conversations + len(TEMPLATES) * size.question_groups


def _write_pairs(folder: Path, count: int, rng: np.random.Generator, artist: _Artist) -> None:
    """img2dataset's layout: KEY.png, KEY.txt (the short caption), KEY.json (beside it the long one)."""
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, count, PAIRS_PER_TAR)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + PAIRS_PER_TAR, count)):
                key, scene = f"{number:09d}", random_scene(rng)
                caption = short_caption(scene, rng).text()
                record = {"key": key, "caption": caption, "long_caption": long_caption(scene)}
                for suffix, content in (("png", artist.png(scene)), ("txt", caption.encode())):
                    _add_member(tar, f"{key}.{suffix}", content)
                _add_member(tar, f"{key}.json", json.dumps(record).encode())


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_hard_negatives(folder: Path, count: int, rng: np.random.Generator, artist: _Artist) -> None:
    """SugarCrepe's seven files and `images/`."""
    (folder / "images").mkdir(parents=True)
    for kind in KINDS:
        items: dict[str, dict[str, str]] = {}
        while len(items) < count:
            scene = random_scene(rng)
            caption = short_caption(scene, rng)
            negative = hard_negative(kind, scene, caption, rng)
            if negative is not None:
                name = f"{kind}_{len(items):05d}.png"
                (folder / "images" / name).write_bytes(artist.png(scene))
                items[str(len(items))] = {
                    "filename": name,
                    "caption": caption.text(),
                    "negative_caption": negative.text(),
                }
        write_json(folder / f"{kind}.json", items)


def _write_captions(folder: Path, count: int, rng: np.random.Generator, artist: _Artist) -> None:
    """LLaVA-Pretrain's layout: one question that asks for the caption."""
    rows = []
    for number in range(count):
        scene, name = random_scene(rng), f"caption_{number:06d}.png"
        _write_image(folder / "images" / name, scene, artist)
        turns = [("human", "<image>\nDescribe the picture."), ("gpt", long_caption(scene))]
        rows.append(_conversation(name, turns))
    write_json(folder / "captions.json", rows)


def _write_conversations(folder: Path, count: int, rng: np.random.Generator, artist: _Artist) -> None:
    """LLaVA-mix's layout: several multiple-choice questions about one image, answered by the letter."""
    rows = []
    for number, (scene, questions) in enumerate(_quizzes(count, rng)):
        name = f"conversation_{number:06d}.png"
        _write_image(folder / "images" / name, scene, artist)
        turns = [turn for q in questions for turn in (("human", q.prompt()), ("gpt", q.letter))]
        turns[0] = ("human", f"<image>\n{turns[0][1]}")
        rows.append(_conversation(name, turns))
    write_json(folder / "conversations.json", rows)


def _write_image(path: Path, scene: Scene, artist: _Artist) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(artist.png(scene))


def _conversation(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "id": name.removesuffix(".png"),
        "image": name,
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }


def _quizzes(count: int, rng: np.random.Generator) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes with questions; the first of each comes from the templates in turn, the others from any that fit the scene."""
    names = list(TEMPLATES)
    streams = {name: balanced_questions(name, count, rng) for name in names}
    for number in range(count):
        scene, first = next(streams[names[number % len(names)]])
        questions = [first]
        while len(questions) < QUESTIONS_PER_CONVERSATION:
            another = TEMPLATES[names[int(rng.integers(len(names)))]].ask(scene, rng)
            if another is not None:
                questions.append(another)
        yield scene, questions


def _write_questions(path: Path, groups: int, rng: np.random.Generator, artist: _Artist) -> None:
    """MMBench's TSV: every question in four rotations (index + k * 10^6), which point to the first pass for their image."""
    columns = ("index", "question", "hint", *LETTERS, "answer", *CATEGORY_COLUMNS, "image", "source", "comment", "split")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", delimiter="\t")
        writer.writeheader()
        index = 0
        for name, template in TEMPLATES.items():
            for scene, question in balanced_questions(name, groups, rng):
                image = base64.b64encode(artist.png(scene)).decode()
                for rotation in range(len(LETTERS)):
                    asked = question.rotated(rotation)
                    row = {"index": index + rotation * ROTATION_STRIDE, "question": asked.text, "answer": asked.letter}
                    row |= dict(zip(LETTERS, asked.options, strict=True))
                    row |= dict(zip(CATEGORY_COLUMNS, (template.category, template.l2_category), strict=True))
                    writer.writerow(row | {"image": image if rotation == 0 else index, "source": "demo", "split": "dev"})
                index += 1


def _texts(count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """What the language model learns: captions, and the same questions about a scene that is told instead of shown."""
    for number, (scene, questions) in enumerate(_quizzes(count, rng)):
        if number % 4 == 0:
            yield {"text": short_caption(scene, rng).text() if number % 8 else long_caption(scene)}
            continue
        turns = [turn for q in questions for turn in (("user", q.prompt()), ("assistant", q.letter))]
        turns[0] = ("user", f"{long_caption(scene)}\n{turns[0][1]}")
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}
