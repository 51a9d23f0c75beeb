"""Answer rules that several benchmarks share, and lmms-eval's own functions for those that it words itself."""

from __future__ import annotations

import functools
import importlib.util
import string
from collections.abc import Sequence
from types import ModuleType

from eval.lmm.tasks.dataset import lmms_eval_folder

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.cache
def lmms_eval_module(name: str) -> ModuleType:
    """A file of the installed lmms-eval, such as `tasks/mme/utils.py`, without its packages, which are slow to import."""
    spec = importlib.util.spec_from_file_location(
        f"_lmms_eval_{name.removesuffix('.py').replace('/', '_')}", lmms_eval_folder() / name
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact_match_form(text: str) -> str:
    """What lmms-eval's `exact_match` compares with `ignore_case` and `ignore_punctuation`."""
    return text.strip().lower().translate(_NO_PUNCTUATION)


def lettered(options: Sequence[str]) -> dict[str, str]:
    return {chr(ord("A") + place): option for place, option in enumerate(options)}
