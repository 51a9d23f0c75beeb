"""MMBench scoring (arXiv 2307.06281): a model's text comes in, a letter or None goes out; records come in, accuracies go out.

A group is one question with its rotations of the options; it is right under circular evaluation only when every rotation is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ROTATION_STRIDE = 1_000_000
OPTION_LETTERS = ("A", "B", "C", "D")

TAXONOMY: dict[str, dict[str, tuple[str, ...]]] = {
    "perception": {
        "coarse_perception": ("image_style", "image_topic", "image_scene", "image_emotion", "image_quality"),
        "finegrained_perception (instance-level)": (
            "object_localization",
            "attribute_recognition",
            "celebrity_recognition",
            "ocr",
        ),
        "finegrained_perception (cross-instance)": ("spatial_relationship", "attribute_comparison", "action_recognition"),
    },
    "reasoning": {
        "attribute_reasoning": ("physical_property_reasoning", "function_reasoning", "identity_reasoning"),
        "relation_reasoning": ("social_relation", "nature_relation", "physical_relation"),
        "logic_reasoning": ("structuralized_imagetext_understanding", "future_prediction"),
    },
}
"""Official names: L1 -> L2 -> L3."""

_L1_OF_L2 = {l2: l1 for l1, l2_names in TAXONOMY.items() for l2 in l2_names}
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def parse_answer(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that `response` chooses among the question's own `options`, or None: VLMEvalKit's exact matching.

    First the letters: exactly one of the options' letters stands as a word, among the last five words. Else the texts: the
    response contains exactly one option's text (case ignored) and is at most twice as long as all options together.
    Nothing is guessed; what stays None counts as wrong.
    """
    if any(refusal in response for refusal in _REFUSALS):
        return None
    words = response.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if len(response) > 2 * sum(map(len, options.values())):
        return None
    matches = [letter for letter, text in options.items() if text.lower() in response.lower()]
    return matches[0] if len(matches) == 1 else None


def record(row: Mapping[str, Any], response: str, task: str) -> dict[str, Any]:
    """One line of `records.jsonl` from a question row (see `mmbench_data.read_questions`) and the model's raw text."""
    prediction = parse_answer(response, row["options"])
    return {
        "task": task,
        "index": row["index"],
        "group": row["index"] % ROTATION_STRIDE,
        "rotation": row["index"] // ROTATION_STRIDE,
        "category": row["category"],
        "l2_category": row["l2_category"],
        "question": row["question"],
        "options": dict(row["options"]),
        "answer": row["answer"],
        "response": response,
        "prediction": prediction,
        "correct": prediction == row["answer"],
        "image_sha256": row["image_sha256"],
    }


def score_records(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies as fractions: `overall`, and per name under `l1`, `l2`, `l3`.

    Each holds `groups`, `rows`, `circular` (all rotations of a group right), `vanilla` (first pass right; over the groups
    that have a first pass), `parse_failure_rate` (over rows). Names outside the official table are scored under their own
    name and have no L1; records without a category count in `overall` only.
    """
    rows = list(records)
    return {
        "overall": _accuracies(rows),
        "l1": _by_name(rows, lambda row: _L1_OF_L2.get(row["l2_category"] or "")),
        "l2": _by_name(rows, lambda row: row["l2_category"]),
        "l3": _by_name(rows, lambda row: row["category"]),
    }


def circular_hits(records: Iterable[Mapping[str, Any]]) -> dict[int, bool]:
    """Group -> whether all its rotations are right."""
    hits: dict[int, bool] = {}
    for row in records:
        hits[row["group"]] = hits.get(row["group"], True) and row["correct"]
    return hits


def _by_name(rows: list[Mapping[str, Any]], name_of: Callable[[Mapping[str, Any]], str | None]) -> dict[str, Any]:
    by_name = defaultdict(list)
    for row in rows:
        if name := name_of(row):
            by_name[name].append(row)
    return {name: _accuracies(by_name[name]) for name in sorted(by_name)}


def _accuracies(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    circular = circular_hits(rows)
    first_pass = [row["correct"] for row in rows if row["rotation"] == 0]
    return {
        "groups": len(circular),
        "rows": len(rows),
        "circular": sum(circular.values()) / len(circular),
        "vanilla": sum(first_pass) / len(first_pass) if first_pass else None,
        "parse_failure_rate": sum(row["prediction"] is None for row in rows) / len(rows),
    }
