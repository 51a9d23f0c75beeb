"""Seconds to score and to compare two runs of MMBench's size over all levels with 10,000 resamples, on one core.

    OMP_NUM_THREADS=1 python benchmarks/compare_runs.py [--file ANSWERS.xlsx] [--resamples 10000] [--rounds 3]

With `--file` (such as the published answers of LLaVA-1.5-13B) its rows are the first run, and every row gets categories of
MMBench's own number and names by its group, because the published file has none; else 4,377 rows are made. The second run has
a seeded tenth of the answers changed. Times are of whole commands (reading, arithmetic, writing) without the start of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from eval.__main__ import main as lift_eval
from eval.answers.read import read_answers
from eval.lmm.tasks import LMM_TASKS
from eval.mmbench import ROTATION_STRIDE, TAXONOMY
from eval.output import format_table
from eval.records import Record, write_records
from lift.common.files import write_json

CATEGORIES = [
    {"l1": l1, "l2": l2, "l3": l3} for l1, l2_names in TAXONOMY.items() for l2, l3_names in l2_names.items() for l3 in l3_names
]


def made_rows(rows: int, seed: int) -> list[Record]:
    """Groups of two to four options, as many passes each, answered right three times of four."""
    generator, records, group = random.Random(seed), [], 0
    while len(records) < rows:
        letters = "ABCD"[: generator.choice((2, 3, 4, 4))]
        for rotation in range(min(len(letters), rows - len(records))):
            answer = letters[-rotation % len(letters)]
            doc = {"index": group + rotation * ROTATION_STRIDE, "question": f"question {group}?", "answer": answer}
            doc |= {letter: f"option {letter} {group} {rotation}" for letter in letters}
            response = answer if generator.random() < 0.75 else generator.choice(letters)
            records.append(LMM_TASKS["mmbench"].record(doc, response, []))
        group += 1
    return records


def changed(records: list[Record], share: float, seed: int) -> list[Record]:
    """Another run: a share of the rows answered with a letter drawn from the options."""
    generator, others = random.Random(seed), []
    for record in records:
        if generator.random() < share:
            letter = generator.choice(list(record.options))
            record = replace(record, response=letter, prediction=letter, score=float(letter == record.answer[0]))
        others.append(record)
    return others


def write_run(folder: Path, records: list[Record]) -> None:
    (folder / "mmbench").mkdir(parents=True)
    write_records(folder / "mmbench" / "records.jsonl", records)
    write_json(folder / "run.json", {"model": folder.name, "tasks": {"mmbench": {"rows": len(records)}}})


def seconds(*arguments: object) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        status = lift_eval([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--rows", type=int, default=4377)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    records = read_answers(arguments.file).records if arguments.file else made_rows(arguments.rows, 0)
    records = [replace(record, categories=CATEGORIES[int(record.group) % len(CATEGORIES)]) for record in records]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_run(folder / "a", records)
        for seed, name in enumerate(("b", "a1", "b1"), start=1):
            write_run(folder / name, changed(records, 0.1, seed))
        pair = ["compare", folder / "a", folder / "b", "--resamples", arguments.resamples, "--out", folder / "c"]
        seeds = [*pair, "--more_a", f"[{folder / 'a1'}]", "--more_b", f"[{folder / 'b1'}]"]
        commands = {"score, run folder": ["score", folder / "a"], "compare": pair, "compare, two seeds a side": seeds}
        if arguments.file:
            commands["score, file"] = ["score", arguments.file]
        seconds(*commands["score, run folder"])  # imports
        rows = []
        for name, command in commands.items():
            times = [seconds(*command) for _ in range(arguments.rounds)]
            rows.append((name, f"{np.median(times):.2f}", f"{min(times):.2f}-{max(times):.2f}"))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{len(records)} rows, {arguments.resamples} resamples; {platform.machine()}, threads {threads}, numpy {np.__version__}"
    )
    print(format_table(["command", "seconds", "range"], rows))


if __name__ == "__main__":
    main()
