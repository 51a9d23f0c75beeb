"""Names as a reader knows them, and where each benchmark comes from."""

from __future__ import annotations

from typing import Any

TASKS = {
    "mmbench": "MMBench (EN)",
    "mmbench_cn": "MMBench (CN)",
    "gqa": "GQA",
    "pope": "POPE",
    "mme": "MME",
    "seedbench": "SEED-Bench",
    "textvqa": "TextVQA",
    "ai2d": "AI2D",
    "scienceqa": "ScienceQA",
    "scienceqa_img": "ScienceQA (rows with an image)",
}
LEVELS = {"overall": "Overall", "l1": "L1 categories", "l2": "L2 categories", "l3": "L3 categories"}
SOURCES = {
    "mmbench": ("MMBench", "2307.06281"),
    "mmbench_cn": ("MMBench", "2307.06281"),
    "gqa": ("GQA", "1902.09506"),
    "pope": ("POPE", "2305.10355"),
    "mme": ("MME", "2306.13394"),
    "seedbench": ("SEED-Bench", "2307.16125"),
    "textvqa": ("TextVQA", "1904.08920"),
    "ai2d": ("AI2D", "1603.07396"),
    "scienceqa": ("ScienceQA", "2209.09513"),
    "scienceqa_img": ("ScienceQA", "2209.09513"),
}
"""Task -> benchmark and the arXiv number of its paper."""


def task_label(task: str) -> str:
    return TASKS.get(task, task)


def level_label(level: str) -> str:
    """`l2` as `L2 categories`; a level of another benchmark by its own name: `split` as `By split`."""
    return LEVELS.get(level, f"By {level.replace('_', ' ')}")


def plain(name: Any) -> str:
    return str(name).replace("_", " ")
