"""Answers of the original LLaVA's scripts (JSON lines): rows with the questions they belong to become records.

`model_vqa_mmbench.py` writes one line a round with the options as shown: with `--all-rounds` they are rotated and shown under
A, B, C, D, and `option_char` names the letter that each has in the question file. Options end there at the first empty cell or
"None", so that the right one may be missing: such a row counts as wrong. Other scripts write question_id and text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eval.answers.questions import Questions
from eval.answers.read import CIRCULAR_TASKS, Request
from eval.answers.tables import joined_note
from eval.mmbench import OPTION_LETTERS, ROTATION_STRIDE, parse_answer
from eval.records import Record
from lift.common.errors import UserError


def read_rounds(request: Request, rows: list[Any]) -> tuple[list[Record], str, list[str]]:
    """Raises UserError without --questions: the file holds no right answers."""
    if request.questions is None:
        raise request.need("questions", "LLaVA's MMBench answers name no right answer; the benchmark's TSV does.")
    task = request.task or "mmbench"
    if task not in CIRCULAR_TASKS:
        raise UserError(
            f"{request.path}: answers by rounds are MMBench's: expected --task mmbench or mmbench_cn, found {task}."
        )
    questions = Questions(request.questions, task)
    note = joined_note([str(row["question_id"]) for row in rows], questions)
    records = []
    for number, row in enumerate(rows, start=1):
        where = f"{request.path}: row {number} (question {row.get('question_id')}, round {row.get('round_id')})"
        doc = questions.by_key.get(str(row["question_id"]))
        if doc is None:
            raise UserError(f"{where}: is not in {request.questions}. Give the questions that were answered.")
        asked, shown, letters = questions.record(doc, _text(row, where)), row.get("options"), row.get("option_char")
        if not isinstance(shown, list) or not isinstance(letters, list) or len(shown) != len(letters) or len(shown) > 4:
            raise UserError(f"{where}: expected as many options as letters, at most four, found {shown!r} and {letters!r}.")
        for letter, text in zip(letters, shown, strict=True):
            if asked.options.get(letter, "").split() != str(text).split():
                raise UserError(
                    f"{where}: option {letter} is {text!r}, but {asked.options.get(letter)!r} in {request.questions}. "
                    "Give the questions that were answered."
                )
        if not isinstance(row["round_id"], int):
            raise UserError(f"{where}: expected a whole number as round_id.")
        records.append(_rotated(asked, row["round_id"], [str(text) for text in shown], letters, where))
    notes = [note]
    if unseen := [record.key for record in records if record.answer[0] not in record.options]:
        notes.append(
            f"The right option was not shown in {len(unseen)} rows, first {unseen[0]}, which count as wrong: LLaVA's script "
            'takes the option "None" for an empty cell.'
        )
    return records, "llava_mmbench", notes


def _rotated(asked: Record, round_id: int, shown: list[str], letters: list[str], where: str) -> Record:
    """The record of one round: options under the letters that the model saw."""
    if round_id and asked.rotation:
        raise UserError(f"{where}: index {asked.key} is a rotation already. Give answers with one of the two kinds of passes.")
    options, answer = dict(zip(OPTION_LETTERS, shown, strict=False)), asked.answer[0]
    if answer in letters:
        answer = OPTION_LETTERS[letters.index(answer)]
    elif answer in options:  # the letter of another option, so that a wrong answer would count as right
        raise UserError(f"{where}: the right option {answer} was not shown, but others under its letter: {', '.join(letters)}.")
    prediction = parse_answer(asked.response, options)
    return replace(
        asked,
        key=str(int(asked.key) + round_id * ROTATION_STRIDE),
        rotation=asked.rotation or round_id,
        options=options,
        answer=[answer],
        prediction=prediction,
        score=float(prediction == answer),
    )


def read_texts(request: Request, rows: list[Any]) -> tuple[list[Record], str, list[str]]:
    """Raises UserError without --questions, or for an answer to none of them."""
    if request.questions is None:
        raise request.need("questions", "LLaVA's answers (question_id, text) name neither question nor right answer.")
    if request.task is None and request.questions.is_dir():
        raise request.need("task", "answers with question_id and text do not say which benchmark they are of.")
    questions = Questions(request.questions, request.task or "mmbench")
    records = []
    for number, row in enumerate(rows, start=1):
        where = f"{request.path}: row {number}"
        doc = questions.by_key.get(str(row.get("question_id")))
        if doc is None:
            raise UserError(
                f"{where}: question {row.get('question_id')} is not in {request.questions}, whose first is "
                f"{next(iter(questions.by_key))}. Give the questions that were answered, and --task."
            )
        records.append(questions.record(doc, _text(row, where)))
    return records, "llava", [joined_note([record.key for record in records], questions)]


def _text(row: Any, where: str) -> str:
    if not isinstance(row.get("text"), str):
        raise UserError(f"{where}: expected the answer as 'text', found {row.get('text')!r}.")
    return str(row["text"])
