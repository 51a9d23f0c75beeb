"""`lift-eval report`: gathers what the page shows, and writes OUT.html with OUT.json and OUT.csv beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import plotly
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from eval.comparison.command import compare_answers
from eval.output import write_csv
from eval.page import render
from eval.report import names, plots, tables
from eval.report.encoders import encoders_of
from eval.report.flips import Gallery, Thumbnails, gallery
from eval.report.reading import paper_readings
from eval.report.training import read_training, total_cost
from eval.settings import ReportSettings
from lift.common.checks import given
from lift.common.environment import describe_environment
from lift.common.errors import UserError
from lift.common.files import atomic_file, read_json, write_json, write_text

HERE = Path(__file__).parent
MEGABYTE = 1_000_000


def report(settings: ReportSettings) -> None:
    """Command `lift-eval report`.

    Raises:
        UserError: a folder is not what it should be, the runs saw other questions, or the page cannot be as small as asked.
    """
    out = given(settings.out, "out")
    found, flips, notes = compare_answers(settings)
    comparison: dict[str, Any] = tables.without_nan(found)
    encoders = encoders_of(settings)
    training = {"a": read_training(settings.training_a), "b": read_training(settings.training_b)}
    values = page_values(comparison, encoders, training) | {"stages": _read_stages(settings.stages), "notes": notes}
    page, shown = write_page(settings, comparison, flips, values)
    write_text(out, page)
    write_json(out.with_suffix(".json"), _numbers(values, shown))
    with atomic_file(out.with_suffix(".csv")) as temporary:
        write_csv(temporary, tables.csv_rows(comparison, encoders))
    print(values["headline"])
    for reading in values["readings"]:
        print(f"The paper's reading, {names.task_label(reading['task'])}: {reading['verdict']}. {reading['sentence']}")
    counts = shown.counts
    for note in notes:
        print(note)
    left = f", {counts['left_out']} left out" if counts["left_out"] else ""
    size = len(page.encode("utf-8", errors="backslashreplace")) / MEGABYTE
    print(f"{out}: {size:.1f} MB, {counts['embedded']} of {counts['total']} flips{left}; .json and .csv beside it")


def page_values(
    comparison: dict[str, Any], encoders: dict[str, Any] | None, training: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What the template prints, the gallery aside."""
    return {
        "comparison": comparison,
        "headline": tables.headline(comparison),
        "overall": tables.overall_rows(comparison),
        "readings": paper_readings(comparison),
        "tasks": tables.task_tables(comparison),
        "encoders": encoders,
        "training": training,
        "costs": {side: total_cost(runs) for side, runs in training.items()},
        "sources": dict.fromkeys(names.SOURCES[task] for task in comparison["tasks"] if task in names.SOURCES),
        "made_with": describe_environment() | {"plotly": plotly.__version__},
    }


def write_page(
    settings: ReportSettings, comparison: dict[str, Any], flips: list[dict[str, Any]], values: dict[str, Any]
) -> tuple[str, Gallery]:
    """The page, and the flips that it holds: as many as the size allows beside everything else.

    Raises:
        UserError: the page is too large without a single flip.
    """
    name_a, name_b = comparison["name_a"], comparison["name_b"]
    block = {
        "names": {"a": name_a, "b": name_b},
        "tasks": {task: names.task_label(task) for task in comparison["tasks"]},
        "categories": list(dict.fromkeys(row["name"] for row in comparison["rows"])),  # in the order of the tables
        "levels": list(dict.fromkeys(level for flip in flips for level in flip["categories"])),
        "views": plots.category_figures(comparison),
        "losses": plots.loss_figures(values["training"], name_a, name_b),
        "print_cards": settings.print_cards,
    }
    plotly_script, script = get_plotlyjs(), (HERE / "report.js").read_text(encoding="utf-8")
    fixed = {
        "plotly_script": Markup(plotly_script),
        "script": Markup(script),
        "script_hashes": [_source_hash(plotly_script), _source_hash(script)],
        "style": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "amount": tables.amount,
        "interval_text": tables.interval_text,
        "p_text": tables.p_text,
        "p_of": tables.p_of,
        "plain": names.plain,
        "task_label": names.task_label,
    }

    def page_with(shown: Gallery) -> str:
        data = block | {"flips": shown.flips, "images": shown.images}
        return render(
            "report/report.html.jinja", **values, **fixed, block=json_block(data), flips=shown.counts, losses=block["losses"]
        )

    limit = None if settings.flips == "all" else int(settings.flips)
    with Thumbnails((settings.run_a, settings.run_b), comparison["tasks"]) as thumbnails:
        empty = len(page_with(gallery(flips, thumbnails, 0, 0)).encode("utf-8", errors="backslashreplace"))
        room = settings.max_megabytes * MEGABYTE - empty
        if room < 0:
            raise UserError(
                f"--max_megabytes {settings.max_megabytes}: without any flips the page has {empty / MEGABYTE:.2f} MB already "
                "(4.8 of them plotly). Allow more."
            )
        shown = gallery(flips, thumbnails, limit, int(room))
    return page_with(shown), shown


def json_block(value: Any) -> Markup:
    """JSON that stands in a `<script type="application/json">` whatever texts it holds: none of them ends or opens a tag."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source_hash(script: str) -> str:
    """By which the page's Content-Security-Policy knows its own scripts; nothing else on it may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _numbers(values: dict[str, Any], shown: Gallery) -> dict[str, Any]:
    kept = ("headline", "comparison", "readings", "encoders", "training", "costs", "stages", "notes", "made_with")
    return {name: values[name] for name in kept} | {"flips": shown.counts}


def _read_stages(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    stages = read_json(path, "the list of stages")
    if not isinstance(stages, list) or not all(
        isinstance(s, dict) and {"stage", "seconds", "peak_gb", "reused"} <= s.keys() for s in stages
    ):
        raise UserError(f'{path}: expected a list of {{"stage", "seconds", "peak_gb", "reused"}}.')
    return stages
