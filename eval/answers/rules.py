"""Answer rules for files whose benchmark has no reader of its own, and lmms-eval's static rule for MMBench."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from eval.lmm.tasks.rules import lmms_eval_module
from eval.records import Record
from lift.common.errors import UserError


def yes_or_no(response: str) -> str | None:
    """The one of the words yes and no that stands in the response; None for neither or both."""
    found = {"yes", "no"} & set(re.findall(r"[^\W\d_]+", response.lower()))
    return found.pop() if len(found) == 1 else None


def exact_match(response: str, answer: str) -> float:
    """1 when both are the same but for case, outer white space and a final full stop."""
    return float(response.strip().rstrip(".").lower() == answer.strip().rstrip(".").lower())


def static_hits(records: Sequence[Record]) -> list[bool] | None:
    """Whether lmms-eval's rule of `mmbench_en_dev_static` counts each row as right; None when lmms-eval is not installed.

    The letter is found by lmms-eval's own functions: first its exact letters and texts, then its loose extraction, which takes
    the "B" of "Because". Nothing is drawn at random. A question counts there when all its rows do.
    """
    functions = _static_functions()
    if functions is None:
        return None
    evaluator, extract = functions
    hits = []
    for record in records:
        item: dict[str, Any] = {letter: record.options.get(letter) for letter in "ABCD"}
        item["prediction"] = record.response.strip()
        found = evaluator.prefetch_answer(dict(item))
        hits.append((found or extract(item["prediction"], choices=sorted(record.options))) == record.answer[0])
    return hits


@lru_cache(maxsize=1)
def _static_functions() -> tuple[Any, Callable[..., str]] | None:
    try:
        evals = lmms_eval_module("tasks/mmbench/mmbench_evals.py")
        extract = lmms_eval_module("tasks/_task_utils/mcq_extract.py")
    except UserError:
        return None
    evals.eval_logger.disable(evals.__name__)  # it reports every "A" that might be an article
    return evals.MMBench_Evaluator(), extract.extract_mcq_answer
