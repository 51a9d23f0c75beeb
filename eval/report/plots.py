"""Figures of the report as Plotly's JSON: rows come in, dicts of `data` and `layout` go out; the page's script draws them.

A trace's `meta.side` is `a`, `b` or `neither`: the script colours by it, so that colours follow the light or dark page.
Names from data are escaped, since Plotly reads tags in texts.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

from eval.report.names import level_label, plain, task_label
from eval.report.tables import ahead

SYMBOLS = {"a": "circle", "b": "diamond", "neither": "square-open", "no interval": "x-thin"}
LABEL_WIDTH = 24
"""Characters of a line beside a plot, so that the plot keeps its room on a phone."""

Figure = dict[str, Any]


def category_figures(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """What can be chosen above the plots: `{"task", "level", "label", "forest", "bars"}`, one a task and level.

    Where several tasks were compared, the first has their overall rows side by side (`task` is then "").
    """
    names = _short(comparison["name_a"]), _short(comparison["name_b"])
    primary = [row for row in comparison["rows"] if row["primary"] and row["difference"] is not None]
    overall = [row | {"name": task_label(row["task"])} for row in primary if row["level"] == "overall"]
    views: list[tuple[str, str, str, list[dict[str, Any]]]] = []
    if len(overall) > 1:
        views.append(("", "overall", "Every benchmark, overall", overall))
    for task in comparison["tasks"]:
        of_task = [row for row in primary if row["task"] == task]
        first = [row | {"name": "overall"} for row in of_task if row["level"] == "overall"]
        levels = list(dict.fromkeys(row["level"] for row in of_task if row["level"] != "overall"))
        for level in levels or ["overall"]:
            rows = [row for row in of_task if row["level"] == level and level != "overall"]
            views.append((task, level, level_label(level), [*first, *rows]))
    return [
        {"task": task, "level": level, "label": label, "forest": forest(rows, *names), "bars": bars(rows, *names)}
        for task, level, label, rows in views
    ]


def forest(rows: Sequence[dict[str, Any]], name_a: str, name_b: str) -> Figure:
    """Differences in points with their intervals, the first row on top."""
    labels = [_label(f"{plain(row['name'])} (n={row['n']:,})") for row in rows]
    legend = {"a": f"{name_a} ahead", "b": f"{name_b} ahead", "neither": "not told apart"}
    kinds = [_kind(row) for row in rows]
    if "no interval" in kinds:
        legend["no interval"] = "not told apart, no interval"
    traces: list[dict[str, Any]] = []
    for kind, text in legend.items():
        chosen = [(label, row) for label, row, its_kind in zip(labels, rows, kinds, strict=True) if its_kind == kind]
        points = [100 * row["difference"] for _, row in chosen]
        bounds = [row["interval"] and [100 * bound for bound in row["interval"]] for _, row in chosen]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _text(text),
                "meta": {"side": "neither" if kind == "no interval" else kind},
                "x": points or [None],
                "y": [label for label, _ in chosen] or [None],
                "marker": {"symbol": SYMBOLS[kind], "size": 11, "line": {"width": 2}},
                "error_x": {
                    "visible": kind != "no interval",  # where a bar of no length would look certain
                    "type": "data",
                    "symmetric": False,
                    "array": [ends and ends[1] - point for ends, point in zip(bounds, points, strict=True)],
                    "arrayminus": [ends and point - ends[0] for ends, point in zip(bounds, points, strict=True)],
                    "thickness": 2,
                    "width": 5,
                },
                "text": [
                    f"{point:+.2f} ({'{:+.2f} to {:+.2f}'.format(*ends) if ends else 'no interval'})"
                    for point, ends in zip(points, bounds, strict=True)
                ],
                "hovertemplate": "%{y}<br>%{text}<extra></extra>",
            }
        )
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1.5}, "layer": "below"}
    title = f"difference in points<br>← {_text(name_b)} better<br>{_text(name_a)} better →"  # lines that fit a phone
    layout = _layout(labels, lines=max(label.count("<br>") for label in labels) + 1, title=title)
    return {"data": traces, "layout": layout | {"shapes": [zero]}}


def _kind(row: dict[str, Any]) -> str:
    side = ahead(row)
    return "no interval" if side == "neither" and row["interval"] is None else side


def bars(rows: Sequence[dict[str, Any]], name_a: str, name_b: str) -> Figure:
    """Values of both runs in percent, in pairs; B is hatched."""
    labels = [_label(plain(row["name"])) for row in rows]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _text(name),
            "meta": {"side": side},
            "x": [100 * row[f"value_{side}"] for row in rows],
            "y": labels,
            "marker": {"pattern": {"shape": "/" if side == "b" else "", "size": 6, "solidity": 0.35}},
            "text": [f"{100 * row[f'value_{side}']:.1f}" for row in rows],
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": "%{y}: %{x:.2f} %<extra></extra>",
        }
        for side, name in (("b", name_b), ("a", name_a))  # from below, so that A is the upper bar and first in the legend
    ]
    layout = _layout(labels, lines=max(label.count("<br>") for label in labels) + 1, title="%", row_height=42)
    longest = 100 * max(row[f"value_{side}"] for row in rows for side in ("a", "b"))
    layout["xaxis"] |= {"range": [0, min(112, 1.18 * longest + 1)]}
    layout["legend"] = _LEGEND | {"traceorder": "reversed"}
    return {"data": traces, "layout": layout | {"barmode": "group", "bargap": 0.28, "bargroupgap": 0.06}}


def loss_figures(training: dict[str, list[dict[str, Any]]], name_a: str, name_b: str) -> list[dict[str, Any]]:
    """Both sides' loss over the steps, `{"label", "figure"}` a stage that either side has."""
    names, dashes = {"a": _short(name_a), "b": _short(name_b)}, {"a": "solid", "b": "dash"}
    stages = list(dict.fromkeys(run["stage"] for side in ("a", "b") for run in training[side]))
    figures = []
    for stage in stages:
        traces = [
            {
                "type": "scatter",
                "mode": "lines+markers" if len(run[curve]["step"]) < 40 else "lines",
                "name": _text(names[side] + (" (validation)" if curve == "validation" else "")),
                "meta": {"side": side},
                "x": run[curve]["step"],
                "y": run[curve]["loss"],
                "line": {"dash": "dot" if curve == "validation" else dashes[side], "width": 2},
                "marker": {"symbol": SYMBOLS[side], "size": 6},
                "hovertemplate": "step %{x}: %{y:.3f}<extra></extra>",
            }
            for side in ("a", "b")
            for run in training[side]
            if run["stage"] == stage
            for curve in ("curve", "validation")
            if run[curve]["step"]
        ]
        layout = {
            "height": 300,
            "margin": {"l": 52, "r": 12, "t": 34, "b": 44},
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "loss"}},
            "legend": _LEGEND,
        }
        if traces:
            figures.append({"label": stage, "figure": {"data": traces, "layout": layout}})
    return figures


_LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}


def _layout(labels: Sequence[str], lines: int, title: str, row_height: int = 30) -> dict[str, Any]:
    height = max(row_height, 17 * lines + 6) * len(labels)
    return {
        "height": height + 120,
        "margin": {"l": 8, "r": 16, "t": 36, "b": 84},
        "xaxis": {
            "title": {"text": title, "font": {"size": 12}, "standoff": 10},
            "automargin": True,
            "zeroline": False,
        },
        "yaxis": {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(reversed(labels)),
            "tickmode": "array",  # every label, however little room there is
            "tickvals": list(labels),
            "range": [-0.6, len(labels) - 0.4],
            "automargin": True,
            "tickfont": {"size": 12},
            "ticks": "",
            "showgrid": False,
        },
        "legend": _LEGEND | {"traceorder": "normal"},
    }


def _short(name: str) -> str:
    return name if len(name) <= LABEL_WIDTH else f"{name[: LABEL_WIDTH - 1]}…"


def _text(text: str) -> str:
    """Plotly reads tags and `&lt;`, but shows `&quot;` as it stands."""
    return html.escape(text, quote=False)


def _label(text: str) -> str:
    return "<br>".join(map(_text, textwrap.wrap(text, width=LABEL_WIDTH))) or " "
