"""Command `lift-eval data`: the published files of a benchmark come in, the folder that lmms-eval reads offline goes out."""

from __future__ import annotations

from eval.lmm.tasks import LMM_TASKS, task_source
from eval.lmm.tasks.dataset import check_repository_folder, write_tables
from eval.settings import DataSettings, given
from lift.common.errors import UserError


def data(settings: DataSettings) -> None:
    """Command `lift-eval data`."""
    out, task = given(settings.out, "out"), LMM_TASKS[settings.task]
    repositories = {task_source(each.lmms_task).repository for each in LMM_TASKS.values()}
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not any((out / name).is_dir() for name in repositories)):
        raise UserError(f"{out}: expected a new folder or one of lift-eval data, found other files. Choose another --out.")
    check_repository_folder(out / task_source(task.lmms_task).repository)
    published = task.read(settings.source, settings.allow_missing)
    rows = write_tables(published.tables, out)[0]
    for reason, count in published.left_out.items():
        print(f"{settings.source}: left out {count} questions: {reason}.")
    print(f"{out}: {rows} rows for lmms-eval's task {task.lmms_task}; run it in this folder with HF_HUB_OFFLINE=1.")
