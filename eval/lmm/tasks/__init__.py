"""Benchmarks of LMMs: what the rows of each are, what counts as right, and how its published files become lmms-eval's data.

One file a benchmark. `LMM_TASKS` is the table by which `lift-eval lmm`, `data`, `score` and `compare` know a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.lmm.tasks import ai2d, gqa, mmbench, mme, pope, scienceqa, seedbench, textvqa
from eval.lmm.tasks.dataset import image_hash, task_source, write_tables
from eval.lmm.tasks.published import Published, Source
from eval.records import Record

__all__ = ["LMM_TASKS", "LmmTask", "image_hash", "task_source"]


@dataclass(frozen=True)
class LmmTask:
    name: str
    lmms_task: str
    """lmms-eval's own task that is run."""
    record: Callable[[Mapping[str, Any], str, Sequence[str]], Record]
    """(row as lmms-eval's task holds it, without images; raw response; `image_hash` of each image) -> Record."""
    letters: Callable[[Mapping[str, Any]], list[str]]
    """Row -> option letters that the likelihood is taken over; none for open answers."""
    read: Callable[[Source], Published]
    """Published file or folder -> its rows, checked. Raises UserError."""
    scored_by_lmms: bool = True
    """False: lmms-eval's own scoring cannot run offline (it asks a GPT judge), so it only collects the answers."""
    max_new_tokens: int = 16

    def convert(self, source: Path, out: Path) -> int:
        """Writes the published `source` into the folder `out` in lmms-eval's form (see `write_tables`); returns the rows.

        Raises:
            UserError: another layout, faulty rows, images that are missing or do not decode, no rows.
        """
        return write_tables(self.read(Source(source)).tables, out)[0]


def _task(name: str, lmms_task: str, benchmark: Any, **values: Any) -> LmmTask:
    record, read = partial(benchmark.record, name), partial(benchmark.read, lmms_task)
    return LmmTask(name, lmms_task, record, benchmark.letters, read, **values)


_TASKS = [
    _task("mmbench", "mmbench_en_dev_static", mmbench),
    _task("mmbench_cn", "mmbench_cn_dev", mmbench, scored_by_lmms=False),
    _task("gqa", "gqa", gqa),
    _task("pope", "pope", pope),
    _task("mme", "mme", mme),
    _task("seedbench", "seedbench", seedbench),
    _task("textvqa", "textvqa_val", textvqa),
    _task("ai2d", "ai2d", ai2d),
    _task("scienceqa", "scienceqa", scienceqa),
    _task("scienceqa_img", "scienceqa_img", scienceqa),
]
LMM_TASKS: dict[str, LmmTask] = {task.name: task for task in _TASKS}
