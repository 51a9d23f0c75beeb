"""lmms-eval's `*_samples_*.jsonl` (from `--log_samples`): rows become records, with the questions when they are given.

`doc_hash` is the same on every row there, so that `doc_id`, the row's place in the data, is what joins.
"""

from __future__ import annotations

from typing import Any

from eval.answers.questions import Questions
from eval.answers.read import Request
from eval.answers.rules import yes_or_no
from eval.lmm.tasks import LMM_TASKS
from eval.records import Record
from lift.common.errors import UserError

TASK_OF_METRIC = {
    "gpt_eval_score": "mmbench",
    "pope_accuracy": "pope",
    "mme_perception_score": "mme",
    "mme_cognition_score": "mme",
    "seed_all": "seedbench",
}
"""Metrics of one benchmark only; others, such as exact_match, are of many."""


def read_samples(request: Request, rows: list[Any]) -> tuple[list[Record], str, list[str]]:
    """Raises UserError when neither the metrics nor --task say which benchmark it is, or for a row that does not fit."""
    named = {TASK_OF_METRIC[name] for name in rows[0] if name in TASK_OF_METRIC}
    task = request.task or (named.pop() if len(named) == 1 else None)
    if task is None:
        raise request.need("task", "these samples have the metrics of several benchmarks.")
    questions = Questions(request.questions, task) if request.questions else None
    seen: dict[object, int] = {}
    records, notes = [], []
    for number, row in enumerate(rows, start=1):
        where = f"{request.path}: row {number}"
        if row.get("doc_id") in seen:
            raise UserError(f"{where}: doc_id {row['doc_id']} stands in row {seen[row['doc_id']]} already.")
        seen[row.get("doc_id")] = number
        response, metric = _response(row, where), _metric(row, task)
        if questions is not None:
            records.append(_asked(questions, row, response, where))
        elif task in LMM_TASKS and isinstance(metric, dict) and {"index", "question", "answer", "A"} <= metric.keys():
            records.append(LMM_TASKS[task].record(metric, response, []))
        else:
            records.append(_bare(task, row, response, metric, where))
    if questions is not None:
        notes.append(f"Questions and categories of {len(records)} rows are from {request.questions}, by doc_id.")
    elif not any(record.categories for record in records):
        notes.append("The samples name no category: only overall scores. Give --questions with the benchmark's data.")
    return records, "lmms_eval", notes


def _response(row: Any, where: str) -> str:
    value = row.get("filtered_resps", row.get("resps"))
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise UserError(f"{where}: expected one text in filtered_resps, found {str(value)[:60]!r}.")
    return value


def _metric(row: Any, task: str) -> Any:
    """What the row says of its score: a benchmark's own metric, exact_match, or the first that is a number or tells one."""
    for name, value in row.items():
        if TASK_OF_METRIC.get(name) == task:
            return value
    if "exact_match" in row:
        return row["exact_match"]
    reserved = {"doc_id", "target", "resps", "filtered_resps", "token_counts", "doc_hash", "input", "doc", "arguments"}
    known = [value for name, value in row.items() if name not in reserved]
    numbers = [value for value in known if isinstance(value, (int, float)) and not isinstance(value, bool)]
    dicts = [value for value in known if isinstance(value, dict)]
    return next(iter(numbers), next(iter(dicts), None))


def _asked(questions: Questions, row: Any, response: str, where: str) -> Record:
    place = row["doc_id"]
    if not isinstance(place, int) or not 0 <= place < len(questions.docs):
        raise UserError(f"{where}: doc_id {place!r}, but {questions.path} has {len(questions.docs)} rows.")
    record, target = questions.record(questions.docs[place], response), row["target"]
    if isinstance(target, str) and record.answer and target.strip().lower() not in {each.lower() for each in record.answer}:
        raise UserError(
            f"{where}: target {target!r}, but {record.answer[0]!r} is right in row {place} of {questions.path}. "
            "Give the data that was answered."
        )
    return record


def _bare(task: str, row: Any, response: str, metric: Any, where: str) -> Record:
    """Only what the sample says: score, target, and a category where the metric holds one."""
    fields = metric if isinstance(metric, dict) else {}
    prediction = str(fields.get("pred", fields.get("prediction", response))).strip() or None
    score = metric if isinstance(metric, (int, float)) else fields.get("score")
    if score is None and "answer" in fields:
        score = (prediction or "").lower() == str(fields["answer"]).strip().lower()  # as lmms-eval scores SEED-Bench
    if score is None or not 0 <= float(score) <= 1:
        raise UserError(f"{where}: expected a score of 0 to 1 among the metrics, found {score!r}. Give --questions.")
    target = row["target"] if isinstance(row["target"], list) else [row["target"]]
    answer = [str(each) for each in target]
    if task in ("pope", "mme"):
        prediction, answer = yes_or_no(prediction or ""), [each.strip().lower() for each in answer]
    return Record(
        task=task,
        key=str(row["doc_id"]),
        group=f"{fields['category']}/{fields['question_id']}"
        if task == "mme" and "question_id" in fields
        else str(row["doc_id"]),
        rotation=0,
        categories={"category": str(fields["category"])} if fields.get("category") else {},
        question=str(row.get("input", "")),
        options={},
        answer=answer,
        response=response,
        prediction=prediction,
        score=float(score),
    )
