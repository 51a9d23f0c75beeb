"""What an LMM answered: one `Record` a question row, the same for every benchmark and for published answer files.

Whatever runs a model or reads an answer file writes records; whatever counts, compares or shows answers reads records
only. A run folder holds one `TASK/records.jsonl` a benchmark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lift.common.errors import UserError
from lift.common.files import read_jsonl, write_jsonl

RECORDS_FILE = "records.jsonl"


@dataclass(frozen=True)
class Likelihood:
    """The choice of the option letter with the highest probability after the prompt: one forward pass, nothing to parse."""

    prediction: str
    score: float
    """1 when it is the right letter, else 0."""
    log_probabilities: dict[str, float]
    """Letter of the question -> natural logarithm of the probability, in the whole vocabulary, that the model says it next."""


@dataclass(frozen=True)
class Record:
    task: str
    """Name in `eval.lmm.tasks`, such as `mmbench`."""
    key: str
    """Unique within the task; the published id of the row where there is one (MMBench: the index)."""
    group: str
    """What other rows share with this one, so that they are resampled together: the circular group, the image."""
    rotation: int
    """Place among the circular passes of a question; 0 for the first and for benchmarks without passes."""
    categories: dict[str, str]
    """Level -> name, from coarse to fine (`l1`, `l2`, `l3`; `split`; `subject`, `topic`); empty where a row has none."""
    question: str
    options: dict[str, str]
    """Letter -> text; empty for open answers."""
    answer: list[str]
    """What is right: one letter or word, or the annotators' answers (TextVQA)."""
    response: str
    """The model's text, as it came."""
    prediction: str | None
    """What the benchmark's rule reads in it; None when it reads nothing (a parse failure, which scores 0)."""
    score: float
    """0 to 1, by the benchmark's rule."""
    images: list[str] = field(default_factory=list)
    """SHA-256 of each image's size and RGB pixels; empty for text-only rows and where the answer file has no images."""
    likelihood: Likelihood | None = None

    @property
    def text_hash(self) -> str:
        """Of what was asked and what counts as right, images aside. Two runs are comparable where it is equal."""
        asked = [self.question, sorted(self.options.items()), self.answer, list(self.categories.items())]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Record:
        """Raises KeyError or TypeError when a key is missing or unknown."""
        likelihood = values.get("likelihood")
        return Record(**values | {"likelihood": Likelihood(**likelihood) if likelihood else None})


def write_records(path: Path, records: Iterable[Record]) -> None:
    write_jsonl(path, [record.to_dict() for record in records])


def read_records(path: Path) -> list[Record]:
    """Raises UserError, with the line, when the file is not one of `write_records`, is empty, or has a key twice."""
    known = {each.name for each in fields(Record)}
    records: list[Record] = []
    line_of_key: dict[tuple[str, str], int] = {}
    for number, values in enumerate(read_jsonl(path, "records of a run"), start=1):
        if not isinstance(values, dict) or (wrong := sorted(known ^ values.keys())):
            found = f"'{wrong[0]}' {'missing' if wrong[0] in known else 'unknown'}" if isinstance(values, dict) else "no object"
            raise UserError(f"{path}:{number}: expected a record of lift-eval lmm, found {found}. Run it again.")
        record = Record.from_dict(values)
        place = (record.task, record.key)
        if place in line_of_key:
            raise UserError(f"{path}:{number}: {record.task} {record.key} stands in line {line_of_key[place]} already.")
        line_of_key[place] = number
        records.append(record)
    if not records:
        raise UserError(f"{path}: expected answers, found none.")
    return records
