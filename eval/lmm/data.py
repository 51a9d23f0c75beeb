"""Where an evaluation's questions come from: a data folder in lmms-eval's form, one MMBench file, or the hub.

In: `--data` and the tasks. Out: checked paths, a content hash a task, and a working folder in which lmms-eval finds the data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from eval.lmm.tasks import LMM_TASKS, LmmTask, task_source
from eval.lmm.tasks.dataset import lmms_eval_folder
from lift.common.errors import UserError
from lift.common.files import require_file, sha256_file, sha256_text
from lift.common.settings import nearest

MMBENCH_FILES = (".tsv", ".xlsx")
_TASKS_OF_A_FILE = ("mmbench", "mmbench_cn")


def chosen_tasks(tasks: str | None, data: Path | None) -> list[LmmTask]:
    """The tasks named, each once, whose data is there; `mmbench` where only an MMBench file is given.

    Raises:
        UserError: lmms-eval is not installed, an unknown name, data that is missing, or neither data nor a network.
    """
    lmms_eval_folder()
    is_file = data is not None and data.suffix in MMBENCH_FILES
    if tasks is None and not is_file:
        raise UserError(f"--tasks is required: names separated by commas, of {', '.join(LMM_TASKS)}.")
    names = list(dict.fromkeys(name.strip() for name in (tasks or "mmbench").split(",") if name.strip()))
    for name in names:
        if name not in LMM_TASKS:
            raise UserError(f"--tasks: unknown task '{name}'. {nearest(name, list(LMM_TASKS))}")
    if not names:
        raise UserError(f"--tasks: expected names, found none. Tasks are: {', '.join(LMM_TASKS)}.")
    chosen = [LMM_TASKS[name] for name in names]
    if data is None:
        if is_offline():
            raise UserError(
                "--data was not given and HF_HUB_OFFLINE is set, so there are no questions. Make a data folder with lift-eval "
                "data and give it as --data, or unset HF_HUB_OFFLINE to take the data sets from the hub."
            )
    elif is_file:
        require_file(data, "an MMBench file")
        if len(names) > 1 or names[0] not in _TASKS_OF_A_FILE:
            raise UserError(
                f"{data}: is one file of MMBench and cannot be the data of --tasks {','.join(names)}. Give a folder of "
                "lift-eval data."
            )
    else:
        for task in chosen:
            _repository(data, task)
    return chosen


def is_offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def data_hash(data: Path | None, task: LmmTask) -> str | None:
    """SHA-256 of the MMBench file, or of the task's files in the data folder; None for the hub."""
    if data is None:
        return None
    if data.is_file():
        return sha256_file(data)
    repository, source = _repository(data, task), task_source(task.lmms_task)
    # MMBench's languages and ScienceQA's halves share a folder: adding one does not change the data of the other
    sources = [task_source(other.lmms_task) for other in LMM_TASKS.values()]
    of_others = {each.config for each in sources if each.repository == source.repository} - {source.config}
    lines = [
        f"{name.as_posix()} {sha256_file(repository / name)}"
        for name in (file.relative_to(repository) for file in repository.rglob("*") if file.is_file())
        if name.parts[0] not in of_others and name.name != "README.md" and not name.parts[0].startswith(".")
    ]
    return sha256_text("\n".join(sorted(lines)))


def data_rows(data: Path, task: LmmTask) -> int | None:
    """Rows of the task's Parquet files where `lift-eval data` wrote them; None in folders of another layout."""
    import pyarrow.parquet

    source = task_source(task.lmms_task)
    files = list((data / source.repository / source.config).glob(f"{source.split}-*.parquet"))
    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files) if files else None


def link_data(data: Path | None, tasks: Sequence[LmmTask], work: Path) -> Path | None:
    """Puts the data sets into `work`, lmms-eval's working folder; returns their folder, None for the hub.

    Raises:
        UserError: an MMBench file with faulty rows.
    """
    if data is None:
        return None
    if data.is_file():
        tasks[0].convert(data, work / "data")
        data = work / "data"
    for owner in {task_source(task.lmms_task).repository.split("/")[0] for task in tasks}:
        (work / owner).symlink_to((data / owner).resolve(), target_is_directory=True)
    return data


def _repository(data: Path, task: LmmTask) -> Path:
    repository = data / task_source(task.lmms_task).repository
    if not repository.is_dir():
        raise UserError(
            f"{repository}: expected the data of {task.name}, but there is no such folder. Make it from the published files: "
            f"lift-eval data FILES --task {task.name} --out {data}"
        )
    return repository
