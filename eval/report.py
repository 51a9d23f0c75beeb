"""`lift-eval report`: a comparison folder comes in, one self-contained HTML page goes out (no network, numbers as in the JSON).

Everything that comes from data is escaped: by Jinja2 in the page, by Plotly's JSON writer and `html.escape` in the plot.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.images import image_from
from eval.mmbench_data import read_questions
from eval.output import percent
from eval.settings import ReportSettings
from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl, require_folder, sha256_file, write_text

# Okabe and Ito's palette, told apart with every kind of colour vision; the marker's shape says the same once more.
COLOURS = {"a": "#0072B2", "b": "#D55E00", "neither": "#5F5F5F"}
SYMBOLS = {"a": "circle", "b": "diamond", "neither": "square-open"}
SIGNIFICANT = 0.05
THUMBNAIL = 200
"""Longest side of a question's image in pixels."""


def report(settings: ReportSettings) -> None:
    """Command `lift-eval report`."""
    require_folder(settings.comparison, "a folder of lift-eval compare")
    comparison = read_json(settings.comparison / "comparison.json", "a comparison")
    flips = read_jsonl(settings.comparison / "flips.jsonl", "the questions that one model gets")
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        comparison=comparison,
        headline=headline(comparison),
        levels=[(level, _level_rows(comparison, level)) for level in ("overall", "l2", "l3")],
        forest=Markup(forest_plot(comparison)),
        encoders=compare_encoders(settings.encoder_a, settings.encoder_b),
        flips=flip_cards(flips, comparison, settings.flips),
        flip_counts={side: sum(flip["right"] == side for flip in flips) for side in ("a", "b")},
        stages=_read_stages(settings.stages),
        percent=percent,
        p_value=p_value,
        colours=COLOURS,
    )
    write_text(settings.out, page)
    print(f"{settings.out}: {headline(comparison)}")


def headline(comparison: dict[str, Any]) -> str:
    """One sentence with the overall difference and what the exact test allows one to say."""
    a, b = comparison["name_a"], comparison["name_b"]
    row = comparison["rows"][0]
    text = (
        f"{a} answers {percent(row['circular_a'])} % of {row['n']} question groups in every rotation, "
        f"{b} {percent(row['circular_b'])} %: a difference of {percent(row['difference'], signed=True)} points"
    )
    if row["interval"] is None:
        return f"{text}; one group says nothing about others like it."
    low, high = row["interval"]
    interval = f"{percent(low, signed=True)} to {percent(high, signed=True)}"
    text += f" (95 % interval {interval}; exact McNemar p {p_value(row['p_value'])})"
    ahead = _ahead(row)
    if ahead == "neither":
        return f"{text}. These questions do not tell which of the two is ahead."
    return f"{text}. On questions like these, {a if ahead == 'a' else b} is ahead."


def forest_plot(comparison: dict[str, Any]) -> str:
    """The differences with their intervals as an HTML fragment that carries Plotly's script."""
    rows = list(reversed(comparison["rows"]))
    figure = go.Figure()
    figure.add_vline(x=0, line_width=1, line_color="#333")
    legend = {
        "a": f"{comparison['name_a']} ahead",
        "b": f"{comparison['name_b']} ahead",
        "neither": "no significant difference",
    }
    labels = [_label(row) for row in rows]
    for side, text in legend.items():
        chosen = [(label, row) for label, row in zip(labels, rows, strict=True) if _ahead(row) == side]
        intervals = [row["interval"] or (row["difference"], row["difference"]) for _, row in chosen]
        points = [100 * row["difference"] for _, row in chosen]
        figure.add_scatter(
            x=points,
            y=[label for label, _ in chosen],
            name=html.escape(text),
            mode="markers",
            marker={"color": COLOURS[side], "symbol": SYMBOLS[side], "size": 10},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [100 * high - point for (_, high), point in zip(intervals, points, strict=True)],
                "arrayminus": [point - 100 * low for (low, _), point in zip(intervals, points, strict=True)],
            },
        )
    figure.update_yaxes(
        categoryorder="array", categoryarray=labels, range=[-0.6, len(rows) - 0.4], automargin=True, tickfont_size=11
    )
    figure.update_xaxes(
        title=f"difference in points, {html.escape(comparison['name_a'])} − {html.escape(comparison['name_b'])}"
    )
    figure.update_layout(
        template="plotly_white",
        height=140 + 42 * len(rows),
        margin={"l": 4, "r": 8, "t": 8, "b": 40},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure.to_html(
        full_html=False, include_plotlyjs=True, include_mathjax=False, config={"displayModeBar": False, "responsive": True}
    )


def compare_encoders(folder_a: Path | None, folder_b: Path | None) -> dict[str, Any] | None:
    """Both encoders' results, and under `rows` their metrics side by side; None when none were given.

    Raises:
        UserError: the two were measured on different data.
    """
    if folder_a is None or folder_b is None:
        return None
    a, b = (read_json(folder / "results.json", "results of lift-eval encoder") for folder in (folder_a, folder_b))
    if a["data_hash"] != b["data_hash"]:
        raise UserError(
            f"{folder_a} and {folder_b}: expected results on the same data, found different data hashes. Measure both again."
        )
    shares = [name for name, metric in a["metrics"].items() if metric["statistic"] != "median_rank"]
    rows = [{"name": name, "a": a["metrics"][name], "b": b["metrics"][name]} for name in shares]
    rows = [row | {"difference": row["a"]["value"] - row["b"]["value"]} for row in rows]
    return {"a": a, "b": b, "rows": rows}


def flip_cards(flips: list[dict[str, Any]], comparison: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Up to `count` questions, half of them right for each model, taken in turn from the categories; with thumbnails.

    A thumbnail is None when the run's data file is no longer there or has changed.
    """
    halves = {side: _spread([flip for flip in flips if flip["right"] == side]) for side in ("a", "b")}
    share_b = min(len(halves["b"]), max(count // 2, count - len(halves["a"])))
    chosen = halves["a"][: count - share_b] + halves["b"][:share_b]
    images = _images(comparison["runs"]["a"]) if chosen else {}
    return [flip | {"thumbnail": images and _thumbnail(images[flip["index"]], flip["index"])} for flip in chosen]


def _spread(flips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of every category, then a second of every category, and so on."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, dict[str, Any]]] = []
    for flip in flips:
        ranked.append((seen.get(flip["category"], 0), len(ranked), flip))
        seen[flip["category"]] = seen.get(flip["category"], 0) + 1
    return [flip for _, _, flip in sorted(ranked, key=lambda entry: entry[:2])]


def _images(run: dict[str, Any]) -> dict[int, bytes]:
    data = Path(run["data"])
    if not data.is_file() or sha256_file(data) != run["data_hash"]:
        return {}
    return {row["index"]: row["image"] for row in read_questions(data)}


def _thumbnail(content: bytes, index: int) -> str:
    image = image_from(f"the image of index {index}", lambda: content).load()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _ahead(row: dict[str, Any]) -> str:
    """By the exact test, adjusted within its level: the bootstrap interval is too narrow where few groups differ."""
    p = row["p_value"] if row["p_holm"] is None else row["p_holm"]
    if p >= SIGNIFICANT:
        return "neither"
    return "a" if row["difference"] > 0 else "b"


def _label(row: dict[str, Any]) -> str:
    name = "overall" if row["level"] == "overall" else f"{row['level'].upper()} {row['name'].replace('_', ' ')}"
    lines = textwrap.wrap(f"{name} (n={row['n']})", width=24)  # narrow, so that the plot keeps its room on a phone
    return "<br>".join(map(html.escape, lines))


def _level_rows(comparison: dict[str, Any], level: str) -> list[dict[str, Any]]:
    return [row | {"ahead": _ahead(row)} for row in comparison["rows"] if row["level"] == level]


def _read_stages(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    stages = read_json(path, "the list of stages")
    if not isinstance(stages, list) or not all(
        isinstance(s, dict) and {"stage", "seconds", "peak_gb", "reused"} <= s.keys() for s in stages
    ):
        raise UserError(f'{path}: expected a list of {{"stage", "seconds", "peak_gb", "reused"}}.')
    return stages
