"""`lift embed` in processes of their own, which a test may kill, stop or starve: forks of a server that imports torch once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["lift.embed", "transformers.models.llama.modeling_llama", "pandas", "pytest"])


def start(arguments: list[str], errors: Path, die_at_rename: int | None = None, max_bytes: int | None = None) -> BaseProcess:
    """Starts `lift ARGUMENTS` with what it prints in `errors`.

    Args:
        die_at_rename: the process kills itself where it would rename a file for the n-th time (from 0).
        max_bytes: largest file that it can write.
    """
    process = _SERVER.Process(target=_run, args=(arguments, errors, die_at_rename, max_bytes))
    process.start()
    return process


def run(arguments: list[str], errors: Path, die_at_rename: int | None = None, max_bytes: int | None = None) -> int:
    """Exit status, negative for a signal."""
    process = start(arguments, errors, die_at_rename, max_bytes)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _run(arguments: list[str], errors: Path, die_at_rename: int | None, max_bytes: int | None) -> None:
    import torch

    from lift.__main__ import COMMANDS
    from lift.common.cli import run_command

    torch.set_num_threads(1)
    with errors.open("w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        if die_at_rename is not None:
            _die_at_rename(die_at_rename)
        if max_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
        status = run_command("lift", COMMANDS, arguments)
    sys.exit(status)


def _die_at_rename(number: int) -> None:
    left = [number]
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return rename(self, target)

    Path.replace = replace  # type: ignore[method-assign,assignment]
