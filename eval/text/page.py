"""The page of `lift-eval text`: measured pairs come in, one self-contained HTML page with scatter plots goes out.

Sentences are untrusted: Jinja2 escapes them in the page, `html.escape` in the plots, where Plotly takes tags in hover texts.
"""

from __future__ import annotations

import html
import textwrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from numpy.typing import NDArray

from eval.page import BLUE, ORANGE, figure_fragment, render
from eval.text.measure import READING, Measured, auc_rows, kind_cells, number
from eval.text.metrics import Floats

SHOWN = 1000
"""Points of each meaning in a plot, at most."""
STYLES = {True: ("same meaning", BLUE, "circle"), False: ("different meaning", ORANGE, "diamond-open")}


def scatter_page(measured: Measured, result: dict[str, Any]) -> str:
    """HTML with the three plots, the figures and the lists of pairs."""
    shown = _shown(measured.same, result["bootstrap"]["seed"])
    labels = {side: f"{side.upper()}: {result['encoders'][side]['label']}" for side in "ab"}
    axes = [
        ("word overlap", measured.overlap, f"similarity, {labels['a']}", measured.a),
        ("word overlap", measured.overlap, f"similarity, {labels['b']}", measured.b),
        (f"similarity, {labels['a']}", measured.a, f"similarity, {labels['b']}", measured.b),
    ]
    hover = [_hover(measured, index) for index in range(len(measured.pairs))]
    figures = [
        _figure(x_label, x, y_label, y, measured.same, shown, hover, number == 0)
        for number, (x_label, x, y_label, y) in enumerate(axes)
    ]
    return render(
        "text.html.jinja",
        result=result,
        labels=labels,
        figures=figures,
        shown=len(shown),
        auc_rows=auc_rows(result),
        reading=READING,
        kinds=kind_cells(result["kinds"]),
        number=number,
    )


def _shown(same_P: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(same_P), np.flatnonzero(~same_P)]
    return np.concatenate([rng.choice(side, SHOWN, replace=False) if len(side) > SHOWN else side for side in sides])


def _hover(measured: Measured, index: int) -> str:
    """The pair and its figures, escaped, in lines that fit beside a point."""
    pair = measured.pairs[index]
    lines = [line for sentence in (pair.first, pair.second) for line in (*textwrap.wrap(sentence, 48), "")]
    lines += [
        f"{pair.kind}; overlap {measured.overlap[index]:.2f}",
        f"A {measured.a[index]:.3f}, B {measured.b[index]:.3f}",
    ]
    return "<br>".join(map(html.escape, lines))


def _figure(
    x_label: str,
    x_P: Floats,
    y_label: str,
    y_P: Floats,
    same_P: NDArray[np.bool_],
    shown: NDArray[np.int64],
    hover: list[str],
    first: bool,
) -> Markup:
    figure = go.Figure()
    for is_same, (name, colour, symbol) in STYLES.items():
        chosen = shown[same_P[shown] == is_same]
        figure.add_scatter(
            x=x_P[chosen].tolist(),
            y=y_P[chosen].tolist(),
            name=name,
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.7},
            text=[hover[index] for index in chosen],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_xaxes(title=html.escape(x_label))
    figure.update_yaxes(title=html.escape(y_label), automargin=True)
    figure.update_layout(
        height=400,
        margin={"l": 8, "r": 8, "t": 8, "b": 90},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        hoverlabel_align="left",
    )
    return figure_fragment(figure, first)
