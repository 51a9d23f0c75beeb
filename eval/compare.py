"""`lift-eval compare`: two runs on the same questions come in; accuracies, differences and paired tests per subtask go out.

The unit is the circular group. Tests are adjusted (Holm) within the L2 categories and within the L3 categories.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.mmbench import circular_hits, score_records
from eval.output import format_table, percent, write_csv
from eval.paired import holm, paired_result
from eval.settings import CompareSettings, given
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, read_jsonl, require_folder, write_json, write_jsonl

Records = list[dict[str, Any]]

_SAME = ("question", "options", "answer", "image_sha256", "category", "l2_category")


def compare(settings: CompareSettings) -> None:
    """Command `lift-eval compare`: writes `comparison.json`, `comparison.csv`, `flips.jsonl`; prints the table.

    Two folders of `lift-eval encoder` are compared by `eval.compare_encoders`.
    """
    for run in (settings.run_a, settings.run_b):
        require_folder(run, "a folder of lift-eval encoder or lift-eval lmm")
    are_encoders = [(run / "results.json").is_file() for run in (settings.run_a, settings.run_b)]
    if all(are_encoders):
        from eval.compare_encoders import compare_encoders

        compare_encoders(settings)
        return
    if any(are_encoders):
        raise UserError(
            f"{settings.run_a} and {settings.run_b}: expected two folders of lift-eval encoder or two of lift-eval lmm, "
            "found one of each."
        )
    out = given(settings.out, "out")
    check_output_folder(out, "comparison.json")
    records_a, records_b = _read_records(settings.run_a), _read_records(settings.run_b)
    check_same_questions(records_a, records_b, settings.run_a, settings.run_b)
    rows = compare_records(records_a, records_b, settings.resamples, settings.seed)
    comparison = {
        "name_a": settings.name_a,
        "name_b": settings.name_b,
        "unit": "circular group",
        "bootstrap": {"resamples": settings.resamples, "seed": settings.seed, "interval": "95 % percentile"},
        "rows": rows,
        "runs": {"a": _run_summary(settings.run_a), "b": _run_summary(settings.run_b)},
    }
    with atomic_folder(out) as work:
        write_json(work / "comparison.json", comparison)
        write_csv(work / "comparison.csv", rows)
        write_jsonl(work / "flips.jsonl", find_flips(records_a, records_b))
    print(comparison_table(comparison))


def check_same_questions(records_a: Records, records_b: Records, run_a: Path, run_b: Path) -> None:
    """Raises UserError, naming the first difference, unless both runs answered the same questions, options and images."""
    by_key_a, by_key_b = ({(row["task"], row["index"]): row for row in records} for records in (records_a, records_b))
    if only := sorted(by_key_a.keys() ^ by_key_b.keys()):
        where = run_a if only[0] in by_key_a else run_b
        raise UserError(
            f"{run_a} and {run_b}: expected the same questions; {len(only)} are in one run only, "
            f"first {only[0][0]} index {only[0][1]} (only in {where}). Run both on the same data."
        )
    for key, row_a in by_key_a.items():
        for name in _SAME:
            if row_a[name] != by_key_b[key][name]:
                raise UserError(
                    f"{run_a} and {run_b}: {key[0]} index {key[1]} has another {name}: "
                    f"{row_a[name]!r} and {by_key_b[key][name]!r}. Run both on the same data."
                )


def compare_records(records_a: Records, records_b: Records, resamples: int, seed: int) -> list[dict[str, Any]]:
    """One row for `overall` and for every L2 and L3 category; fractions, differences are A - B on circular accuracy.

    `p_holm` is None for `overall`, which is the one test asked first.
    """
    scores_a, scores_b = score_records(records_a), score_records(records_b)
    rows: list[dict[str, Any]] = []
    for level, name_of in (
        ("overall", lambda row: "overall"),
        ("l2", lambda row: row["l2_category"]),
        ("l3", lambda row: row["category"]),
    ):
        split_a, split_b = _split(records_a, name_of), _split(records_b, name_of)
        level_rows = []
        for name in sorted(split_a):
            hits_a, hits_b = circular_hits(split_a[name]), circular_hits(split_b[name])
            groups = sorted(hits_a)
            outcome_a, outcome_b = (np.array([hits[group] for group in groups], dtype=bool) for hits in (hits_a, hits_b))
            a, b = (scores["overall"] if level == "overall" else scores[level][name] for scores in (scores_a, scores_b))
            row = {"level": level, "name": name, "circular_a": a["circular"], "circular_b": b["circular"]}
            row |= {"vanilla_a": a["vanilla"], "vanilla_b": b["vanilla"]}
            row |= {"unparsed_a": a["parse_failure_rate"], "unparsed_b": b["parse_failure_rate"]}
            level_rows.append(row | asdict(paired_result(outcome_a, outcome_b, resamples, seed)) | {"p_holm": None})
        if level != "overall":
            for row, adjusted in zip(level_rows, holm([row["p_value"] for row in level_rows]), strict=True):
                row["p_holm"] = adjusted
        rows += level_rows
    return rows


def find_flips(records_a: Records, records_b: Records) -> Records:
    """First passes of the groups that exactly one model has right, with both models' answers to every rotation."""
    hits_a, hits_b = circular_hits(records_a), circular_hits(records_b)
    by_index_b = {row["index"]: row for row in records_b}
    passes: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(records_a, key=lambda row: row["rotation"]):
        other = by_index_b[row["index"]]
        answers = {"answer": row["answer"], "response_a": row["response"], "response_b": other["response"]}
        passes[row["group"]].append(answers | {"correct_a": row["correct"], "correct_b": other["correct"]})
    kept = ("index", "group", "category", "l2_category", "question", "options", "answer", "image_sha256")
    return [
        {name: row[name] for name in kept} | {"right": "a" if hits_a[row["group"]] else "b", "passes": passes[row["group"]]}
        for row in records_a
        if row["rotation"] == 0 and hits_a[row["group"]] != hits_b[row["group"]]
    ]


def comparison_table(comparison: dict[str, Any]) -> str:
    """`comparison.json` as text, in percent."""
    a, b = comparison["name_a"], comparison["name_b"]
    rows = []
    for row in comparison["rows"]:
        name = row["name"] if row["level"] == "overall" else f"{row['level'].upper()} {row['name']}"
        interval = (
            "–" if row["interval"] is None else f"[{percent(row['interval'][0], True)}, {percent(row['interval'][1], True)}]"
        )
        accuracies = [percent(row[key]) for key in ("circular_a", "circular_b", "vanilla_a", "vanilla_b")]
        p_holm = "–" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
        discordant = f"{row['only_a']}:{row['only_b']}"
        rows.append(
            (
                name,
                row["n"],
                *accuracies,
                percent(row["difference"], True),
                interval,
                discordant,
                f"{row['p_value']:.3g}",
                p_holm,
            )
        )
    header = [
        "circular %",
        "n",
        a,
        b,
        f"{a} first",
        f"{b} first",
        "difference",
        "95 % interval",
        f"only {a}:{b}",
        "p",
        "p (Holm)",
    ]
    return format_table(header, rows)


def _split(records: Records, name_of: Callable[[dict[str, Any]], str | None]) -> dict[str, Records]:
    by_name = defaultdict(list)
    for row in records:
        if name := name_of(row):
            by_name[name].append(row)
    return by_name


def _read_records(run: Path) -> Records:
    require_folder(run, "a run folder of lift-eval lmm")
    records = read_jsonl(run / "records.jsonl", "the answers of a run")
    if not records:
        raise UserError(f"{run / 'records.jsonl'}: expected answers, found none.")
    return records


def _run_summary(run: Path) -> dict[str, Any]:
    values = read_json(run / "run.json", "the summary of a run")
    return {"folder": str(run.resolve())} | {
        key: value for key, value in values.items() if key not in ("scores", "lmms_eval_static")
    }
