"""Which checkpoint a run goes on from: the newest complete one.

Trainer writes `checkpoint-*` in place and, when resuming, trusts what is there. So each checkpoint gets a list of its files and
their sizes as its last act; what lacks it, or does not fit it, was cut off and is removed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lift.common.errors import UserError
from lift.common.files import read_json, write_json

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path, world_size: int) -> None:
    files = {str(file.relative_to(checkpoint)): file.stat().st_size for file in sorted(checkpoint.rglob("*")) if file.is_file()}
    write_json(checkpoint / COMPLETE, {"world_size": world_size, "files": files})


def is_complete(checkpoint: Path) -> bool:
    if not (checkpoint / COMPLETE).is_file():
        return False
    files = read_json(checkpoint / COMPLETE)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files.items())


def newest_complete(folder: Path, world_size: int) -> Path | None:
    """The checkpoint to resume from, or None; does not change anything on disk.

    Raises:
        UserError: it was written by another number of processes, which DeepSpeed cannot load.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        if is_complete(checkpoint):
            written_by = read_json(checkpoint / COMPLETE)["world_size"]
            if written_by != world_size:
                raise UserError(
                    f"{checkpoint}: was written by {written_by} processes, this run has {world_size}. "
                    f"Go on with {written_by}, or remove {folder} to start over."
                )
            return checkpoint
    return None


def remove_incomplete(folder: Path) -> None:
    for checkpoint in _checkpoints(folder):
        if not is_complete(checkpoint):
            print(f"{checkpoint}: incomplete, removed")
            shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
