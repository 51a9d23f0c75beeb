"""Runs lmms-eval's own command line on one model and some of its tasks; its output files and a log are what comes out.

lmms-eval is quiet about failure (its exit status is 0, stock models turn errors into empty answers), so a caller takes nothing
for done before it has found every row's answer.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from eval.lmm.plugin import MODEL_NAME, PROGRESS
from lift.common.errors import UserError
from lift.common.files import read_jsonl

_OF_A_LAUNCHER = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|ACCELERATE_\w+")
_ERROR_LINE = re.compile(r"^\S*(Error|Exception|Interrupt)\b.*")
_LIBC = ctypes.CDLL(None)  # opened here: between fork and exec a lock of the loader may be held
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SILENT_FAILURE = re.compile(r"Error (.*) in generating")


def run_lmms_eval(
    lmms_tasks: Sequence[str],
    model: Path,
    work: Path,
    outputs: Path,
    log: Path,
    *,
    dtype: str,
    device: str,
    batch_size: int,
    from_hub: bool,
    model_name: str = MODEL_NAME,
    model_args: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    answers_only: bool = False,
) -> str:
    """Answers lmms-eval's tasks with the LLaVA folder `model`; returns the command that was run.

    Args:
        work: existing folder in which the process runs; offline it holds the data sets (see `eval.lmm.data.link_data`).
        outputs: folder for lmms-eval's outputs, inside `work`.
        log: file for everything lmms-eval prints; it outlives a failed run.
        dtype: `auto`, `float32` or `bfloat16`; device: `cpu`, `cuda`, ...
        from_hub: the data sets may come from the hub and the user's own cache.
        max_new_tokens: of every task, in place of the task's own.
        answers_only: leave out lmms-eval's scoring.
    Raises:
        UserError: lmms-eval failed, or its model failed on a question and went on.
    """
    # A link with a plain name: lmms-eval splits model_args at commas, and a path may hold one.
    if not (work / "model").is_symlink():
        (work / "model").symlink_to(model.resolve(), target_is_directory=True)
    args = {"pretrained": "model", "dtype": dtype} | ({} if model_name == MODEL_NAME else {"device_map": device})
    args |= model_args or {}
    command = [sys.executable, "-m", "lmms_eval", "--model", model_name, "--tasks", ",".join(lmms_tasks)]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in args.items())]
    command += ["--batch_size", str(batch_size), "--device", device]
    command += [] if max_new_tokens is None else ["--gen_kwargs", f"max_new_tokens={max_new_tokens}"]
    # DEBUG is the only level at which lmms-eval lets an error end the process with a traceback and a failing status.
    # Relative to `work`, for lmms-eval splits this at commas too.
    relative = os.path.relpath(outputs.resolve(), work.resolve())
    command += ["--output_path", relative, "--log_samples", "--verbosity", "DEBUG"]
    command += ["--predict_only"] if answers_only else []
    _run(command, work, log, from_hub)
    if silent := _SILENT_FAILURE.search(log.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"lmms-eval's model failed on a question and went on: {silent[1]} Its full output is in {log}.")
    return shlex.join(["lmms-eval", *command[3:]])


def read_samples(outputs: Path, lmms_task: str, log: Path) -> dict[int, str]:
    """doc_id -> what lmms-eval's own filter made of the model's text (mostly nothing).

    Raises:
        UserError: there is not exactly one file of the task's samples, or one without text.
    """
    files = sorted(outputs.rglob(f"*_samples_{lmms_task}.jsonl"))
    if len(files) != 1:
        raise UserError(
            f"{outputs}: expected one file of {lmms_task}'s answers from lmms-eval, found {len(files)}. "
            f"Its full output is in {log}."
        )
    samples = {sample["doc_id"]: sample["filtered_resps"] for sample in read_jsonl(files[0], "lmms-eval's answers")}
    if wrong := [doc_id for doc_id, text in samples.items() if not isinstance(text, str)]:
        raise UserError(f"{files[0]}: expected an answer to row {wrong[0]}, but it is no text. See {log}.")
    return samples


def _run(command: list[str], folder: Path, log: Path, from_hub: bool) -> None:
    # One process, whatever this one is part of: lmms-eval would take the variables of a launcher or a training for its own.
    environment = {name: value for name, value in os.environ.items() if not _OF_A_LAUNCHER.fullmatch(name)}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # lmms-eval prints HF_TOKEN, and its output is kept; the hub's library takes the token by its older name as well.
    if token := environment.pop("HF_TOKEN", None):
        environment["HUGGING_FACE_HUB_TOKEN"] = token
    if not from_hub:
        # The cache does not notice changed data, so each run has its own.
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str((folder / "datasets_cache").resolve())}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    # lmms-eval appends its log, and we its progress bars and tracebacks
    with log.open("ab", buffering=0) as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            preexec_fn=_end_with_parent,
        )
        try:
            assert process.stderr is not None
            _forward(process.stderr, file)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if status != 0:
        advice = " Without --data the data sets come from the hub, which must be reachable." if from_hub else ""
        raise UserError(f"lmms-eval failed ({_exit(status)}): {_last_error(log)} Its full output is in {log}.{advice}")


def _end_with_parent() -> None:
    """In the new process: it is killed when the one that started it is, by whatever signal, and so frees the device at once.

    Answers are appended batch by batch and a torn line is dropped, so that nothing is lost by it.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _forward(source: IO[bytes], log: IO[bytes]) -> None:
    """Copies everything to the log, and to our stderr the progress bar of the model's answers only."""
    line = bytearray()
    shown = False
    while chunk := os.read(source.fileno(), 65536):
        log.write(chunk)
        for part in re.split(rb"(?<=[\r\n])", chunk):
            line += part
            if part.endswith((b"\r", b"\n")):
                if line.startswith(PROGRESS.encode()):
                    sys.stderr.write("\r" + line.decode(errors="replace").strip("\r\n"))
                    sys.stderr.flush()
                    shown = True
                line.clear()
    if shown:
        sys.stderr.write("\n")


def _last_error(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as file:
        lines = deque((line.strip() for line in file if line.strip()), maxlen=200)
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    if not errors:
        return lines[-1] if lines else "it printed nothing."
    # our own errors speak for themselves, and name the link to the model's folder
    return errors[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ").removeprefix("model: ")
