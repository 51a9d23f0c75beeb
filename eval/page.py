"""Self-contained HTML pages with Plotly figures: a template and values come in, one page that needs no network goes out.

Values are escaped by Jinja2; texts that go into a figure are escaped by the caller with `html.escape`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Okabe and Ito's palette, told apart with every kind of colour vision; shapes and dashes say the same once more.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5F5F5F"


def render(template: str, **values: Any) -> str:
    """The page of `eval/TEMPLATE`, everything in `values` but Markup escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    """Keeps its compiled templates."""
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def figure_fragment(figure: go.Figure, first: bool) -> Markup:
    """The figure as an HTML fragment as wide as its place; the `first` one of a page carries Plotly's script."""
    figure.update_layout(template="plotly_white")
    return Markup(
        figure.to_html(
            full_html=False, include_plotlyjs=first, include_mathjax=False, config={"displayModeBar": False, "responsive": True}
        )
    )
