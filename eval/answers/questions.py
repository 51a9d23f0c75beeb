"""A benchmark's questions, for answers that lack them: a TSV, a published layout or a data folder comes in, rows go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.cells import read_cells
from eval.lmm.tasks import LMM_TASKS, task_source
from eval.lmm.tasks.mmbench import question_fields
from eval.lmm.tasks.published import Source
from eval.mmbench import OPTION_LETTERS
from eval.records import Record
from lift.common.errors import UserError


class Questions:
    """Rows of one benchmark, as lmms-eval's task holds them, by place and by the key of their record."""

    def __init__(self, path: Path, task: str) -> None:
        """Raises UserError when `path` holds no questions of the benchmark `task`, or `task` is none of LMM_TASKS."""
        if task not in LMM_TASKS:
            raise UserError(f"--task {task}: --questions can be read for {', '.join(LMM_TASKS)}.")
        self.path, self.task = path, task
        self._record = LMM_TASKS[task].record
        self.docs = _docs(path, task)
        if not self.docs:
            raise UserError(f"{path}: expected questions of {task}, found none.")
        self.by_key = {self._record(doc, "", []).key: doc for doc in self.docs}

    def record(self, doc: Mapping[str, Any], response: str) -> Record:
        return self._record(doc, response, [])


def mmbench_docs(cells: Sequence[Mapping[str, str]], path: Path) -> list[dict[str, Any]]:
    """Rows of an MMBench table as lmms-eval's task holds them, without images.

    Raises:
        UserError: a missing column, an index that is no number or occurs twice, an answer that names no option.
    """
    import pandas as pd

    for name in ("index", "question", "A", "B", "answer"):
        if name not in cells[0]:
            raise UserError(f"{path}: expected the column '{name}', found {', '.join(cells[0])}.")
    rows = question_fields(pd.DataFrame(cells), path)
    return [
        {
            "index": row["index"],
            "question": row["question"],
            "hint": row["hint"],
            **{letter: row["options"].get(letter) for letter in OPTION_LETTERS},
            "answer": row["answer"],
            "category": row["category"],
            "L2-category": row["l2_category"],
        }
        for row in rows
    ]


def _docs(path: Path, task: str) -> list[dict[str, Any]]:
    if path.is_file() and task in ("mmbench", "mmbench_cn"):
        return mmbench_docs(read_cells(path), path)
    if path.is_dir():
        source = task_source(LMM_TASKS[task].lmms_task)
        files = sorted((path / source.repository / source.config).glob(f"{source.split}-*.parquet"))
        if files:
            return _parquet_docs(files)
    published = LMM_TASKS[task].read(Source(path, allow_missing=True))
    return [{name: value for name, value in row.items() if name != "image"} for row in published.tables[0].rows]


def _parquet_docs(files: Sequence[Path]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for file in files:
        names = [name for name in pq.read_schema(file).names if name not in ("image", "images")]
        rows += pq.read_table(file, columns=names).to_pylist()
    return rows


def same_text(a: str | None, b: str | None) -> bool:
    """Whether two texts differ by nothing but white space, which spreadsheets change, or write as a backslash and an n."""
    return _squeezed(a) == _squeezed(b)


def _squeezed(text: str | None) -> str:
    return "".join((text or "").replace("\\n", "\n").split())
