"""Answer rules for files whose benchmark has no reader of its own, and lmms-eval's static rule for MMBench."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from eval.records import Record


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
    """Loaded as files: importing the package takes seconds and touches the GPU."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    tasks = Path(spec.submodule_search_locations[0]) / "tasks"
    evals, extract = _load(tasks / "mmbench" / "mmbench_evals.py"), _load(tasks / "_task_utils" / "mcq_extract.py")
    evals.eval_logger.disable(evals.__name__)  # it reports every "A" that might be an article
    return evals.MMBench_Evaluator(), extract.extract_mcq_answer


def _load(path: Path) -> ModuleType:
    name = f"_lmms_eval_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
