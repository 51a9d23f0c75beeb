"""Runs lmms-eval's own command line on one model and one MMBench file; checked answers and lmms-eval's own score come out.

lmms-eval is quiet about failure (its exit status is 0, stock models turn errors into empty answers), so nothing is taken for
done before every row's answer has been read back and matched with its question.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from eval.lmm.plugin import MODEL_NAME, PROGRESS
from eval.mmbench_data import TASK, task_source, write_dataset
from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl

_OF_A_LAUNCHER = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|ACCELERATE_\w+")
_ERROR_LINE = re.compile(r"^\S*(Error|Exception|Interrupt)\b.*")
_SILENT_FAILURE = re.compile(r"Error (.*) in generating")


@dataclass(frozen=True)
class LmmsResult:
    responses: list[str]
    """One raw answer per question row, in their order."""
    static_score: dict[str, Any] | None
    """lmms-eval's own score, by its looser letter rule: `overall_acc`, `category_acc`, `l2_category_acc` as fractions."""
    command: str


def run_lmms_eval(
    rows: list[dict[str, Any]],
    model: Path,
    work: Path,
    log: Path,
    *,
    model_name: str = MODEL_NAME,
    dtype: str,
    device: str,
    batch_size: int,
    max_new_tokens: int,
    answers_only: bool = False,
) -> LmmsResult:
    """Answers `rows` (see `mmbench_data.read_questions`) with the LLaVA folder `model`.

    Args:
        work: existing folder; `work/lmms_eval` will hold lmms-eval's outputs.
        log: file for everything lmms-eval prints; it outlives a failed run.
        dtype: `auto`, `float32` or `bfloat16`; device: `cpu`, `cuda`, ...
        answers_only: leave out lmms-eval's scoring, which fails on answers with control characters.
    Raises:
        UserError: lmms-eval failed, or left a row without an answer.
    """
    scratch, outputs = work / "scratch", work / "lmms_eval"
    scratch.mkdir()
    write_dataset(rows, scratch, task_source())
    # A link with a plain name: lmms-eval splits model_args at commas, and a path may hold one.
    (scratch / "model").symlink_to(model.resolve(), target_is_directory=True)
    model_args = f"pretrained=model,dtype={dtype}" + ("" if model_name == MODEL_NAME else f",device_map={device}")
    command = [sys.executable, "-m", "lmms_eval", "--model", model_name, "--model_args", model_args, "--tasks", TASK]
    command += ["--batch_size", str(batch_size), "--device", device, "--gen_kwargs", f"max_new_tokens={max_new_tokens}"]
    # DEBUG is the only level at which lmms-eval lets an error end the process with a traceback and a failing status.
    command += ["--output_path", str(outputs.resolve()), "--log_samples", "--verbosity", "DEBUG"]
    command += ["--predict_only"] if answers_only else []
    _run(command, scratch, log)
    score = None if answers_only else read_json(outputs / "submissions" / f"{TASK}_results.json", "lmms-eval's static score")
    result = LmmsResult(_read_responses(outputs, rows, log), score, shlex.join(["lmms-eval", *command[3:]]))
    shutil.rmtree(scratch)
    return result


def _run(command: list[str], folder: Path, log: Path) -> None:
    # One process, whatever this one is part of: lmms-eval would take the variables of a launcher or a training for its own.
    environment = {name: value for name, value in os.environ.items() if not _OF_A_LAUNCHER.fullmatch(name)} | {
        "HF_HUB_OFFLINE": "1",
        # The cache does not notice changed data, so each run has its own.
        "HF_DATASETS_CACHE": str((folder / "datasets_cache").resolve()),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    with log.open("ab", buffering=0) as file:  # appended to by lmms-eval (its log) and by us (its progress bars and tracebacks)
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE
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
        raise UserError(f"lmms-eval failed ({_exit(status)}): {_last_error(log)} Its full output is in {log}.")


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


def _read_responses(outputs: Path, rows: list[dict[str, Any]], log: Path) -> list[str]:
    if silent := _SILENT_FAILURE.search(log.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"lmms-eval's model failed on a question and went on: {silent[1]} Its full output is in {log}.")
    files = sorted(outputs.rglob(f"*_samples_{TASK}.jsonl"))
    if len(files) != 1:
        raise UserError(
            f"{outputs}: expected one file of answers from lmms-eval, found {len(files)}. Its full output is in {log}."
        )
    samples = {sample["doc_id"]: sample for sample in read_jsonl(files[0], "lmms-eval's answers")}
    responses = []
    for position, row in enumerate(rows):
        sample = samples.get(position)
        is_this_row = sample is not None and sample["target"] == row["answer"] and row["question"] in sample["input"]
        if sample is None or not is_this_row or not isinstance(sample["filtered_resps"], str):
            raise UserError(f"{files[0]}: expected the answer to index {row['index']}, but it is not there. See {log}.")
        responses.append(sample["filtered_resps"])
    return responses
