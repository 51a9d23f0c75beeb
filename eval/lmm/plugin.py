"""What lmms-eval's plug-in mechanism finds: the name `lift_llava` and where its class is; and what counts as its answer.

lmms-eval imports this module whenever it starts, so it imports nothing heavy; the class is in `eval.lmm.adapter`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_NAME = "lift_llava"
PROGRESS = "Model Responding"
"""Label of the progress bar, the same as that of lmms-eval's own models."""

# lmms-eval's task writes the answers into an .xlsx, whose cells cannot hold these.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def manifest() -> ModelManifest:
    """Entry point of the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_NAME, chat_class_path="eval.lmm.adapter.LiftLlava")


def clean_answer(text: str, until: str | list[str]) -> str:
    """`text` without control characters, up to the first of the stop strings in it."""
    text = _CONTROL_CHARACTERS.sub("", text)
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop, 1)[0]
    return text
