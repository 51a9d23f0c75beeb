"""`lmm generate`: answers a file of questions in batches.

In: a LLaVA folder and questions as JSON lines. Out: one answer a question, in their order, in the form of the original LLaVA's
answer files, beside it OUT.run.json that says what made them. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.files import read_json, read_whole_rows, sha256_file, sha256_text, write_json, write_jsonl
from lift.common.images import decode_image
from lift.common.ledger import DropLedger
from lmm.conversation import IMAGE_MARKER, SampleFault
from lmm.folders import content_hash
from lmm.inference import Decoding, Llava, check_is_llava, longest_first, number_format, torch_device
from lmm.questions import QuestionRow, check_images, read_questions
from lmm.settings import GenerateSettings

_PACKAGES = ("torch", "transformers")


def generate(settings: GenerateSettings) -> Path:
    """Command `lmm generate`. Returns the answers' file.

    Raises:
        UserError: unusable model, questions or images, or an --out that holds the answers of another run.
    """
    assert settings.questions is not None and settings.out is not None  # the settings checked it
    check_is_llava(settings.model)
    with _locked(settings.out):
        ledger = DropLedger()
        rows = read_questions(settings.questions, settings.images, ledger)
        total = len(rows) + len(ledger)
        run = _identity(settings, rows)
        if _is_finished(settings.out, run):
            print(f"{settings.out}: reused, finished answers of the same model, questions and settings.")
            return settings.out
        _check_ledger(ledger, total, settings)
        rows = check_images(rows, ledger, settings.workers)
        _check_ledger(ledger, total, settings)  # before the model is loaded, which may take minutes
        model = Llava(settings.model, settings.dtype, settings.device)
        prompts = _measure(model, rows, settings.max_new_tokens, ledger)
        _check_ledger(ledger, total, settings)
        rows = [row for row in rows if row.key in prompts]
        write_json(_beside(settings.out, "run.json"), run)
        answers = _answer(settings, model, rows, prompts)
        write_jsonl(settings.out, (_record(row, answers[row.key], run) for row in rows))
        _beside(settings.out, "progress.jsonl").unlink(missing_ok=True)
    cut = sum(answers[row.key]["cut"] for row in rows)
    print(ledger.summary(total))
    print(f"wrote {settings.out}: {len(rows)} answers, {cut} of them cut at {settings.max_new_tokens} tokens")
    return settings.out


def _answer(
    settings: GenerateSettings, model: Llava, rows: list[QuestionRow], lengths: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Text and whether it was cut, by question; each batch is on disk before the next one starts."""
    assert settings.out is not None
    progress = _beside(settings.out, "progress.jsonl")
    answers = {row["key"]: row for row in read_whole_rows(progress)} if progress.is_file() else {}
    write_jsonl(progress, answers.values())  # without a last line that was cut
    waiting = [row for row in rows if row.key not in answers]
    if answers:
        print(f"{progress}: goes on after {len(answers)} answers")
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.seed)
    with progress.open("a", encoding="utf-8") as file, tqdm(total=len(waiting), desc="answers", unit="answer") as bar:
        for batch in longest_first([lengths[row.key] for row in waiting], settings.batch_size):
            chosen = [waiting[position] for position in batch]
            questions = [
                model.question(row.messages, [decode_image(path) for path in row.images], settings.max_new_tokens)
                for row in chosen
            ]
            draws = [int(sha256_text(row.key)[:12], 16) for row in chosen]
            for row, answer in zip(chosen, model.answer(questions, decoding, draws), strict=True):
                answers[row.key] = {"key": row.key, "text": answer.text, "cut": answer.cut}
                file.write(json.dumps(answers[row.key], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    return answers


def _measure(model: Llava, rows: list[QuestionRow], max_new_tokens: int, ledger: DropLedger) -> dict[str, int]:
    """Length in tokens of each prompt that the model can take, by question; the others are entered in `ledger`."""
    lengths = {}
    for row in rows:
        try:
            lengths[row.key] = len(model.question(row.messages, [], max_new_tokens).input_ids)
        except SampleFault as fault:
            ledger.drop(row.key, fault.cause, fault.detail)
    return lengths


def _check_ledger(ledger: DropLedger, total: int, settings: GenerateSettings) -> None:
    """Writes what cannot be answered beside the answers. Raises UserError, with an example, when it is more than allowed."""
    assert settings.out is not None
    path = _beside(settings.out, "dropped.jsonl")
    if not len(ledger):
        path.unlink(missing_ok=True)
        return
    try:
        ledger.check(total, settings.max_drop_fraction, path)
    except UserError as error:
        key, cause, detail = ledger.rows()[0]
        raise UserError(f"{settings.questions}: question {key}: {cause} ({detail}). In all: {error}") from error


def _identity(settings: GenerateSettings, rows: list[QuestionRow]) -> dict[str, Any]:
    """What decides the answers. Batch size and device do not, beyond rounding."""
    assert settings.questions is not None
    paths = sorted({path for row in rows for path in row.images})
    sizes = [f"{path.relative_to(settings.images or '')} {path.stat().st_size if path.is_file() else -1}" for path in paths]
    return {
        "model": str(settings.model),
        "model_hash": content_hash(settings.model),
        "questions_hash": sha256_file(settings.questions),
        "images_hash": sha256_text("\n".join(sizes)),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed if settings.temperature else None,
        "dtype": number_format(settings.dtype, torch_device(settings.device)),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _is_finished(out: Path, run: dict[str, Any]) -> bool:
    """Raises UserError when what lies at `out`, finished or not, is of another run."""
    record, progress = _beside(out, "run.json"), _beside(out, "progress.jsonl")
    if not out.exists() and not progress.exists():
        return False
    if not record.is_file():
        raise UserError(f"{out}: exists and was not written by `lmm generate` (no {record.name}). Choose another --out.")
    earlier = read_json(record, "the record of a run")
    different = [key for key in run if key != "model" and earlier.get(key) != run[key]]
    if different:
        raise UserError(
            f"{out}: holds the answers of another run; different are {', '.join(different)}. Choose another --out, or remove "
            f"{out.name} and the files that begin with its name."
        )
    return out.exists()


def _record(row: QuestionRow, answer: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The original LLaVA's keys; its random `answer_id` is here a hash of run and question."""
    prompt = row.messages[-1]["content"].replace(IMAGE_MARKER, "").strip()
    identity = f"{run['model_hash']} {run['questions_hash']} {row.key} {answer['text']}"
    return {
        "question_id": row.question_id,
        "prompt": prompt,
        "text": answer["text"],
        "answer_id": sha256_text(identity)[:22],
        "model_id": Path(run["model"]).name,
        "metadata": {"cut": answer["cut"]},
    }


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps `out` for this process. Raises UserError when another one is at it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = _beside(out, "lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            mine = False
        if not mine:  # held by another, or removed by one that just ended
            raise UserError(f"{out}: another process is writing it. Wait for its end, or choose another --out.")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
