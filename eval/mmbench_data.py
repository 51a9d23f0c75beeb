"""Names from before there were several benchmarks; `eval.lmm.tasks` is their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.lmm.tasks import dataset, mmbench
from eval.lmm.tasks.dataset import TaskSource
from eval.lmm.tasks.mmbench import question_fields, read_questions, read_table

__all__ = ["TASK", "question_fields", "read_questions", "read_table", "task_source", "write_dataset"]

TASK = "mmbench_en_dev_static"


def task_source(task: str = TASK) -> TaskSource:
    return dataset.task_source(task)


def write_dataset(rows: list[dict[str, Any]], folder: Path, source: TaskSource) -> None:
    its_rows = (row | row["options"] | {"L2-category": row["l2_category"]} for row in rows)
    dataset.write_tables([dataset.Table(source, mmbench.COLUMNS, its_rows)], folder)
