"""Command `lift-eval data`: the published files of a benchmark come in, the folder that lmms-eval reads offline goes out."""

from __future__ import annotations

from eval.lmm.tasks import LMM_TASKS, LmmTask, task_source
from eval.lmm.tasks.dataset import check_repository_folder, write_tables
from eval.lmm.tasks.published import Source
from eval.settings import DataSettings
from lift.common.checks import given
from lift.common.errors import UserError


def data(settings: DataSettings) -> None:
    """Command `lift-eval data`."""
    out, task = given(settings.out, "out"), _task(settings)
    repositories = {task_source(each.lmms_task).repository for each in LMM_TASKS.values()}
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not any((out / name).is_dir() for name in repositories)):
        raise UserError(f"{out}: expected a new folder or one of lift-eval data, found other files. Choose another --out.")
    check_repository_folder(out / task_source(task.lmms_task).repository)
    published = task.read(Source(settings.source, settings.images, settings.allow_missing))
    rows = write_tables(published.tables, out)[0]
    for sentence in published.left_out:
        print(f"{settings.source}: {sentence}")
    print(
        f"{out}: {rows} rows of {task.name} (lmms-eval's {task.lmms_task}). "
        f"Next: lift-eval lmm FOLDER --tasks {task.name} --data {out} --out RUN"
    )


def _task(settings: DataSettings) -> LmmTask:
    if settings.task is None and settings.source.suffix not in (".tsv", ".xlsx"):
        raise UserError(f"{settings.source}: --task is required: the benchmark this is of, one of {', '.join(LMM_TASKS)}.")
    return LMM_TASKS[settings.task or "mmbench"]
