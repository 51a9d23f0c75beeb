"""Answers in tables with a `prediction` column: MMBench's submission form and VLMEvalKit's outputs become records."""

from __future__ import annotations

from collections.abc import Sequence

from eval.answers.cells import read_cells
from eval.answers.questions import Questions, mmbench_docs, same_text
from eval.answers.read import CIRCULAR_TASKS, Request
from eval.answers.rules import exact_match, yes_or_no
from eval.lmm.tasks import LMM_TASKS
from eval.mmbench import OPTION_LETTERS, ROTATION_STRIDE, is_official, parse_answer
from eval.records import Record
from lift.common.errors import UserError

YES_NO_TASKS = ("pope", "mme")


def read_answer_table(request: Request) -> tuple[list[Record], str, list[str]]:
    """Raises UserError for a missing column, or when neither the file nor --task says which benchmark it is."""
    cells = read_cells(request.path)
    if "prediction" not in cells[0]:
        raise UserError(f"{request.path}: expected the column 'prediction', found {', '.join(cells[0])}.")
    task = request.task or ("mmbench" if _is_mmbench(cells) else None)
    if task is None:
        raise request.need("task", "a table of no MMBench questions does not say which benchmark it is of.")
    records, notes = _mmbench(request, cells, task) if task in CIRCULAR_TASKS else _any_benchmark(request, cells, task)
    return records, "table", notes


def _is_mmbench(cells: Sequence[dict[str, str]]) -> bool:
    """Options, and categories that are MMBench's, or none."""
    if not {"index", "A", "B", "answer"} <= cells[0].keys():
        return False
    return all(is_official(name) for name in {row.get("category", "") for row in cells} - {""})


def _mmbench(request: Request, cells: Sequence[dict[str, str]], task: str) -> tuple[list[Record], list[str]]:
    docs, make, notes = mmbench_docs(cells, request.path), LMM_TASKS[task].record, []
    if request.questions is not None:
        questions = Questions(request.questions, task)
        for place, doc in enumerate(docs):
            asked = questions.by_key.get(str(doc["index"]))
            if asked is None:  # a rotation has the categories of its first pass, which may be all that is there
                first = questions.by_key.get(str(doc["index"] % ROTATION_STRIDE), {})
                docs[place] = doc | {name: first.get(name) or doc[name] for name in ("category", "L2-category")}
            else:
                for name in ("answer", "question", *OPTION_LETTERS):
                    if not same_text(doc[name], asked[name]):
                        raise UserError(
                            f"{request.path}: index {doc['index']}: {name} is {doc[name]!r}, but {asked[name]!r} in "
                            f"{request.questions}. Give the questions that were answered."
                        )
                docs[place] = asked
        notes.append(joined_note([str(doc["index"]) for doc in docs], questions))
    records = [make(doc, row["prediction"], []) for doc, row in zip(docs, cells, strict=True)]
    if not any(record.categories for record in records):
        notes.append("The file names no category: only overall scores. Give --questions with the benchmark's TSV.")
    return records, notes


def joined_note(keys: Sequence[str], questions: Questions) -> str:
    """Raises UserError when none of the answers is to one of the questions."""
    absent = [key for key in keys if key not in questions.by_key]
    if len(absent) == len(keys):
        raise UserError(f"{questions.path}: holds none of the {len(keys)} questions answered, such as {absent[0]}.")
    note = f"Categories and options of {len(keys) - len(absent)} of {len(keys)} rows are from {questions.path}."
    return f"{note} The others, first {absent[0]}, are not there." if absent else note


def _any_benchmark(request: Request, cells: Sequence[dict[str, str]], task: str) -> tuple[list[Record], list[str]]:
    """VLMEvalKit's form of other benchmarks: by options, by yes and no, else by the column `hit` or the exact answer."""
    for name in ("question", "answer"):
        if name not in cells[0]:
            raise UserError(f"{request.path}: expected the column '{name}', found {', '.join(cells[0])}.")
    letters = [name for name in cells[0] if len(name) == 1 and name.isupper()]
    yes_no = not letters and {row["answer"].strip().lower() for row in cells} <= {"yes", "no"}
    if task in YES_NO_TASKS and not yes_no:
        raise UserError(f"{request.path}: expected the answers yes and no of {task}, found options or others. Check --task.")
    splits = {row.get("split", "") for row in cells}
    if letters:
        notes = [f"Scored by the options {', '.join(sorted(letters))}, with MMBench's rule."]
    elif yes_no:
        notes = ["Scored by the one word of yes and no that stands in the prediction."]
    else:
        rule = "the column 'hit'" if "hit" in cells[0] else "equality with the answer, but for case and a final full stop"
        notes = [f"Open answers: scored by {rule}."]
    if request.questions is not None:
        notes.append(f"--questions is not used: tables of {task} are read as they are.")
    records = []
    for number, row in enumerate(cells, start=1):
        options = {letter: row[letter] for letter in letters if row[letter] not in ("", "nan")}
        response, answer = row["prediction"], row["answer"]
        if options and answer not in options:
            raise UserError(
                f"{request.path}: row {number + 1}: answer '{answer}' names no option; filled are {', '.join(options)}."
            )
        prediction = parse_answer(response, options) if options else yes_or_no(response) if yes_no else response.strip() or None
        score = float(prediction == (answer.strip().lower() if yes_no else answer))
        if not options and not yes_no:
            if "hit" not in row and answer.startswith("[") and answer.endswith("]"):
                raise UserError(
                    f"{request.path}: row {number + 1}: several answers in one cell, {answer[:40]}, cannot be scored by "
                    "equality. Add a column 'hit' with each row's score."
                )
            score = _hit(request, number, row) if "hit" in row else exact_match(response, answer)
        key = row.get("index") or str(number)
        circular = "g_index" in row
        if circular and not key.removesuffix(".0").isdigit():
            raise UserError(f"{request.path}: row {number + 1}: expected a number as index beside g_index, found '{key}'.")
        levels = {"l2": row.get("l2-category"), "category": row.get("category")}
        levels |= {"split": row.get("split")} if len(splits) > 1 else {}
        records.append(
            Record(
                task=task,
                key=key,
                group=row["g_index"] if circular else row.get("image_path") or key,
                rotation=int(float(key)) // ROTATION_STRIDE if circular else 0,
                categories={level: name for level, name in levels.items() if name},
                question=row["question"],
                options=options,
                answer=[answer.strip().lower() if yes_no else answer],
                response=response,
                prediction=prediction,
                score=score,
            )
        )
    return records, notes


def _hit(request: Request, number: int, row: dict[str, str]) -> float:
    try:
        value = float({"true": "1", "false": "0"}.get(row["hit"].lower(), row["hit"]))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{request.path}: row {number + 1}: expected a hit of 0 to 1, found '{row['hit']}'.")
    return value
