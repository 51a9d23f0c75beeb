"""MMBench (arXiv 2307.06281): its categories and its answer rule; a model's text comes in, a letter or None goes out.

A group is one question with its rotations of the options; it is right under circular evaluation only when every rotation is.
"""

from __future__ import annotations

from collections.abc import Mapping

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
"""Official names: L1 -> L2 -> L3, in the official order."""

_L2_NAMES = [l2 for l2_names in TAXONOMY.values() for l2 in l2_names]
_L3_NAMES = [l3 for l2_names in TAXONOMY.values() for l3_names in l2_names.values() for l3 in l3_names]
_PLACE = {name: place for place, name in enumerate([*TAXONOMY, *_L2_NAMES, *_L3_NAMES])}
_OFFICIAL = {name.replace("_", "").replace(" ", ""): name for name in _PLACE}


def official_name(name: str) -> str:
    """The official spelling of a category, however a file writes its case, spaces and underscores; others as they are."""
    return _OFFICIAL.get("".join(name.lower().replace("_", " ").split()), name)


def is_official(name: str) -> bool:
    return official_name(name) in _PLACE


def official_order(name: str) -> tuple[int, str]:
    """Sort key: categories of one level in the order of `TAXONOMY`, so that those of an L1 and L2 stand together.

    Other names, also those of other benchmarks, follow by the alphabet.
    """
    return _PLACE.get(name, len(_PLACE)), name


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
    A lone Z is the answer "none of them", whatever text stands beside it. Nothing is guessed; what stays None counts as wrong.
    """
    if any(refusal in response for refusal in _REFUSALS):
        return None
    words = response.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return None
    if len(response) > 2 * sum(map(len, options.values())):
        return None
    matches = [letter for letter, text in options.items() if text.lower() in response.lower()]
    return matches[0] if len(matches) == 1 else None
