"""Command `lift-eval compare`: runs on the same questions come in, `comparison.json`, `comparison.csv`, `flips.jsonl` go out.

Tests are adjusted over the categories of one level of one measure. Two folders of `lift-eval encoder` go to
`eval.compare_encoders`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.answers.read import Answers, read_answers
from eval.comparison.flips import find_flips
from eval.comparison.lmms import compare_runs
from eval.output import format_table, percent, write_csv
from eval.records import Record
from eval.settings import CompareSettings
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, sha256_file, write_json, write_jsonl

MANY_UNPARSED = 0.2
"""Share of answers that could not be read from which on the output warns."""


def compare(settings: CompareSettings) -> None:
    """Command `lift-eval compare`.

    Raises:
        UserError: runs of different kinds, of different questions, or none in common.
    """
    runs = [settings.run_a, *settings.more_a, settings.run_b, *settings.more_b]
    for run in runs:
        if not run.exists():
            raise UserError(
                f"{run}: expected a folder of lift-eval encoder or lift-eval lmm, or an answer file, found nothing."
            )
    are_encoders = [(run / "results.json").is_file() for run in runs]
    if all(are_encoders):
        from eval.compare_encoders import compare_encoders

        if len(runs) > 2:
            raise UserError("--more_a and --more_b: several seeds are compared for LMMs only; give two encoder folders.")
        compare_encoders(settings)
        return
    if any(are_encoders):
        raise UserError(
            f"{' and '.join(map(str, runs))}: expected folders of lift-eval encoder only, or runs of lift-eval lmm only, "
            "found one of each."
        )
    out = given(settings.out, "out")
    check_output_folder(out, "comparison.json")
    comparison, flips, notes = compare_answers(settings)
    with atomic_folder(out) as work:
        write_json(work / "comparison.json", comparison)
        write_csv(work / "comparison.csv", [{k: v for k, v in row.items() if k != "seeds"} for row in comparison["rows"]])
        write_jsonl(work / "flips.jsonl", flips)
    print(comparison_table(comparison))
    for note in notes:
        print(note)
    print(f"{out}: comparison.json, comparison.csv, flips.jsonl ({len(flips)} flips)")


def compare_answers(settings: CompareSettings) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """The comparison of LMM runs or answer files, the flips, and what a reader must know of either.

    Raises:
        UserError: a side cannot be read, or the runs are of different questions, or have no task in common.
    """
    for paths in ([settings.run_a, *settings.more_a], [settings.run_b, *settings.more_b]):
        if twice := [path for place, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:place]}]:
            raise UserError(f"{twice[0]}: given twice for one model; a run counted twice is no other seed. Give each once.")
    sides = [
        [(path, read_answers(path, settings.format, settings.task, settings.questions)) for path in paths]
        for paths in ([settings.run_a, *settings.more_a], [settings.run_b, *settings.more_b])
    ]
    runs_a, runs_b = ([(str(path), answers.records) for path, answers in side] for side in sides)
    found = compare_runs(runs_a, runs_b, resamples=settings.resamples, seed=settings.seed, adjust=settings.adjust)
    summaries = [[_summary(path, answers) for path, answers in side] for side in sides]
    if found["seeds"] is not None:
        found["seeds"] |= {"a": summaries[0], "b": summaries[1], "flips": "of the first run of each side"}
    comparison = {"kind": "lmms", "name_a": settings.name_a, "name_b": settings.name_b} | found
    comparison["runs"] = {"a": summaries[0][0], "b": summaries[1][0]}
    compared = set(found["tasks"])
    flips = find_flips(*([record for record in runs[0][1] if record.task in compared] for runs in (runs_a, runs_b)))
    return comparison, flips, _notes(comparison, sides)


def _summary(path: Path, answers: Answers) -> dict[str, Any]:
    """What run.json says; of an answer file its hash."""
    if (path / "run.json").is_file():
        return read_json(path / "run.json", "the summary of a run") | {"folder": str(path.resolve())}
    file_hash = sha256_file(path) if path.is_file() else None
    return {"folder": str(path.resolve()), "format": answers.form, "sha256": file_hash, "notes": answers.notes}


def comparison_table(comparison: dict[str, Any]) -> str:
    """`comparison.json` of LMMs as text, a table a task: the primary measure by category, the others over all of the task."""
    a, b = comparison["name_a"], comparison["name_b"]
    adjustment = {"holm": "Holm", "bh": "BH"}[comparison["adjustment"]]
    header = ["n", a, b, "difference", "95 % interval", f"only {a}:{b}", "p", f"p ({adjustment})", "detectable"]
    header += [f"unparsed {a}", f"unparsed {b}"]
    tables = []
    for task in comparison["tasks"]:
        rows = [row for row in comparison["rows"] if row["task"] == task and (row["primary"] or row["level"] == "overall")]
        rows.sort(key=lambda row: row["level"] != "overall")  # stable: the overall rows of all measures first
        tables.append(format_table([f"{task} (%)", *header], [_cells(row) for row in rows]))
    return "\n\n".join(tables)


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    level = row["level"].upper() if len(row["level"]) == 2 else row["level"]
    name = row["measure"] if row["level"] == "overall" else f"{level} {row['name']}"
    points = row["scale"] == "points"

    def number(value: float | None, signed: bool = False) -> str:
        return f"{value:{'+' if signed else ''}.1f}" if points and value is not None else percent(value, signed)

    interval = "–" if row["interval"] is None else "[{}, {}]".format(*(number(end, True) for end in row["interval"]))
    discordant = "–" if row["only_a"] is None else f"{row['only_a']}:{row['only_b']}"
    p_values = ("–" if row[key] is None else f"{row[key]:.3g}" for key in ("p_value", "p_adjusted"))
    values = (number(row["value_a"]), number(row["value_b"]), number(row["difference"], True))
    unparsed = (percent(row["unparsed_a"]), percent(row["unparsed_b"]))
    return (name, row["n"], *values, interval, discordant, *p_values, number(row["detectable"]), *unparsed)


def _unparsed_notes(comparison: dict[str, Any]) -> list[str]:
    """Answers that could not be read count as wrong: where they are many, a difference is one of form."""
    return [
        f"Warning: {row['task']}: {percent(row[f'unparsed_{side}'])} % of the answers of {comparison[f'name_{side}']} could "
        "not be read, and count as wrong; a difference may be one of form. Look at the likelihood measure, where there is one."
        for row in comparison["rows"]
        if row["level"] == "overall" and row["primary"]
        for side in "ab"
        if (row[f"unparsed_{side}"] or 0) >= MANY_UNPARSED
    ]


def _image_notes(runs: list[list[Record]], tasks: set[str]) -> list[str]:
    """Rows whose images only some runs name, so that nothing says whether all saw the same."""
    having: dict[str, dict[str, int]] = {task: {} for task in sorted(tasks)}
    for records in runs:
        for record in records:
            if record.task in tasks:
                of_task = having[record.task]
                of_task[record.key] = of_task.get(record.key, 0) + bool(record.images)
    counts = {task: sum(0 < number < len(runs) for number in of_task.values()) for task, of_task in having.items()}
    return [
        f"{task}: the images of {count} of {len(having[task])} rows are not compared: not all runs name them."
        for task, count in counts.items()
        if count
    ]


def _notes(comparison: dict[str, Any], sides: list[list[tuple[Path, Answers]]]) -> list[str]:
    notes = [f"{path}: {note}" for side in sides for path, answers in side for note in answers.notes]
    for task, values in comparison["tasks"].items():
        notes += [f"{task}: {each['reason']} ({each['n']} rows, first {each['first']})." for each in values["excluded"]]
    notes += _unparsed_notes(comparison)
    notes += _image_notes([answers.records for side in sides for _, answers in side], set(comparison["tasks"]))
    if comparison["seeds"] is not None and comparison["seeds"]["warning"]:
        notes.append(f"Warning: {comparison['seeds']['warning']}")
    tasks = [{record.task for record in answers.records} for side in sides for _, answers in side]
    if left := sorted(set.union(*tasks) - set(comparison["tasks"])):
        notes.append(f"Not all runs have {', '.join(left)}.")
    return notes
