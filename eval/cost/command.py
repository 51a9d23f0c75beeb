"""`lift-eval cost`: recipes come in, FLOPs, parameters and peak memory of a training sample by caption length go out.

Written are cost.json, cost.csv (a row for each caption length) and cost.html (one self-contained page). Our figures stand
beside the paper's (arXiv 2506.04209) with the difference, whichever way it points.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from tqdm import tqdm

from eval.cost.count import (
    DEFINITION,
    NV_EMBED_DIMENSION,
    ClipRecipe,
    Count,
    LiftRecipe,
    count_clip,
    count_lift,
    read_clip,
    read_lift,
)
from eval.cost.memory import DEFINITION as MEMORY_DEFINITION
from eval.cost.memory import peak_memory
from eval.output import format_table
from eval.page import BLUE, GREY, ORANGE, figure_fragment, render
from eval.settings import CostSettings
from lift.common.files import check_output_folder, write_json, write_text
from lift.common.settings import to_plain
from lift.settings import ClipTextSettings, VisionSettings

PAPER_FLOPS_SAVED = {77: 0.255, 128: 0.357}
PAPER_MEMORY_SAVED = {77: 0.068, 128: 0.126}
"""Shares that LIFT saves of CLIP's, by caption length, as the paper states them for its ViT-B/16."""
PLOTTED = range(16, 513, 16)
NOT_MEASURED = "Peak memory was not measured: there is no CUDA device here."


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


def cost(settings: CostSettings) -> None:
    """Command `lift-eval cost`."""
    check_output_folder(settings.out, "cost.json")
    lift, clip = read_lift(settings.lift, settings.embedding_dim), read_clip(settings.clip)
    is_paper = are_papers(lift, clip)
    lift_count = count_lift(lift)
    rows = []
    for tokens in tqdm(sorted({*PLOTTED, *settings.lengths}), desc="caption lengths", leave=False):
        rows.append(cost_row(tokens, lift_count, count_clip(clip, tokens), is_paper))
    memory = _measure_memory(lift, clip, settings, rows, is_paper) if torch.cuda.is_available() else None
    shown = [row for row in rows if row["tokens"] in settings.lengths]
    tables = [flops_table(shown), parameters_table(shown), memory_table(shown, memory)]
    write_json(settings.out / "cost.json", _as_json(settings, lift, clip, rows, memory))
    write_text(settings.out / "cost.csv", _as_csv(rows))
    page = render(
        "cost.html.jinja",
        headline=headline(shown),
        figures=figures(rows),
        tables=tables,
        models={"LIFT": _describe(settings.lift, lift), "CLIP": _describe(settings.clip, clip)},
    )
    write_text(settings.out / "cost.html", page)
    for table in tables:
        print(f"{table.title}\n{format_table(table.header, table.rows)}" if table.rows else table.title)
        print(f"{table.note}\n")
    print(f"{settings.out}: cost.json, cost.csv (n = {rows[0]['tokens']} to {rows[-1]['tokens']}), cost.html")


def are_papers(lift: LiftRecipe, clip: ClipRecipe) -> bool:
    """Whether the paper's figures are about these models; how they are trained does not matter."""
    of_lift = (lift.vision, lift.embedding_dim, lift.transform.dimensions)
    text = replace(clip.text, tokenizer=None, context_length=ClipTextSettings.context_length)
    return of_lift == (VisionSettings(), NV_EMBED_DIMENSION, None) and (clip.vision, text) == (
        VisionSettings(),
        ClipTextSettings(),
    )


def cost_row(tokens: int, lift: Count, clip: Count, is_paper: bool) -> dict[str, Any]:
    """Costs at one caption length; `saved` is the share of CLIP's FLOPs that LIFT does without.

    `paper_saved` and the difference, ours minus the paper's, are None where the paper states nothing for these models.
    """
    saved = 1 - lift.flops / clip.flops
    paper = PAPER_FLOPS_SAVED.get(tokens) if is_paper else None
    return {
        "tokens": tokens,
        "lift_flops": lift.flops,
        "clip_flops": clip.flops,
        "flops_saved": saved,
        "paper_flops_saved": paper,
        "flops_difference": None if paper is None else saved - paper,
        "lift_parameters": lift.parameters,
        "clip_parameters": clip.parameters,
        "lift_memory": None,
        "clip_memory": None,
        "memory_saved": None,
        "paper_memory_saved": PAPER_MEMORY_SAVED.get(tokens) if is_paper else None,
        "memory_difference": None,
    }


def _measure_memory(
    lift: LiftRecipe, clip: ClipRecipe, settings: CostSettings, rows: list[dict[str, Any]], is_paper: bool
) -> dict[str, Any]:
    """Fills in the memory of `rows`, in bytes, and returns how it was measured."""
    of_lift = peak_memory(lift, 0, settings.memory_batch_size)
    for row in tqdm(rows, desc="peak memory", leave=False):
        of_clip = peak_memory(clip, row["tokens"], settings.memory_batch_size)
        saved = 1 - of_lift / of_clip
        row |= {"lift_memory": of_lift, "clip_memory": of_clip, "memory_saved": saved}
        if row["paper_memory_saved"] is not None:
            row["memory_difference"] = saved - row["paper_memory_saved"]
    return {
        "device": torch.cuda.get_device_name(),
        "batch_size": settings.memory_batch_size,
        "precision": {"lift": lift.precision, "clip": clip.precision},
        "gradient_checkpointing": {"lift": lift.checkpointing, "clip": clip.checkpointing},
    }


def flops_table(rows: list[dict[str, Any]]) -> Table:
    header = ["caption tokens", "LIFT GFLOP", "CLIP GFLOP", "LIFT saves %", "paper %", "ours - paper"]
    cells = [
        [str(row["tokens"]), f"{row['lift_flops'] / 1e9:.2f}", f"{row['clip_flops'] / 1e9:.2f}", *_shares(row, "flops")]
        for row in rows
    ]
    note = DEFINITION
    if any(row["paper_flops_saved"] is not None for row in rows):
        note += " The paper does not say what it counted; no definition that was tried gives its figures."
    return Table("Forward and backward FLOPs of a sample", header, cells, note)


def parameters_table(rows: list[dict[str, Any]]) -> Table:
    header = ["caption tokens", "LIFT million", "CLIP million"]
    cells = [[str(row["tokens"]), f"{row['lift_parameters'] / 1e6:.2f}", f"{row['clip_parameters'] / 1e6:.2f}"] for row in rows]
    note = "CLIP's text tower has a position embedding for each caption token. LIFT's frozen text encoder is not counted."
    return Table("Trained parameters", header, cells, note)


def memory_table(rows: list[dict[str, Any]], memory: dict[str, Any] | None) -> Table:
    title = "Peak memory of a training step"
    header = ["caption tokens", "LIFT GiB", "CLIP GiB", "LIFT saves %", "paper %", "ours - paper"]
    if memory is None:
        stated = [
            f"{100 * r['paper_memory_saved']:.1f} % (n = {r['tokens']})" for r in rows if r["paper_memory_saved"] is not None
        ]
        paper = f" The paper states that LIFT saves {' and '.join(stated)}." if stated else ""
        return Table(title, header, [], NOT_MEASURED + paper)
    cells = [
        [str(row["tokens"]), f"{row['lift_memory'] / 2**30:.2f}", f"{row['clip_memory'] / 2**30:.2f}", *_shares(row, "memory")]
        for row in rows
    ]
    note = f"{MEMORY_DEFINITION} {memory['device']}, batch of {memory['batch_size']}, precision and checkpointing: "
    note += ", ".join(
        f"{name} {memory['precision'][key]} and {'on' if memory['gradient_checkpointing'][key] else 'off'}"
        for key, name in (("lift", "LIFT"), ("clip", "CLIP"))
    )
    return Table(title, header, cells, f"{note}. The paper states neither its batch nor its device.")


def _shares(row: dict[str, Any], what: str) -> list[str]:
    paper, difference = row[f"paper_{what}_saved"], row[f"{what}_difference"]
    return [
        f"{100 * row[f'{what}_saved']:.1f}",
        "–" if paper is None else f"{100 * paper:.1f}",
        "–" if difference is None else f"{100 * difference:+.1f}",
    ]


def headline(rows: list[dict[str, Any]]) -> str:
    """One sentence a caption length: what is saved by our count, and what the paper states."""
    parts = []
    for row in rows:
        paper = "" if row["paper_flops_saved"] is None else f" (the paper states {100 * row['paper_flops_saved']:.1f} %)"
        verb, share = ("less", row["flops_saved"]) if row["flops_saved"] >= 0 else ("more", -row["flops_saved"])
        parts.append(f"{100 * share:.1f} % {verb} at n = {row['tokens']}{paper}")
    return f"Forward and backward FLOPs of a sample, LIFT against CLIP, by our count: {', '.join(parts)}."


def figures(rows: list[dict[str, Any]]) -> list[Any]:
    """FLOPs of both, the share saved with the paper's figures, and peak memory where it was measured."""
    tokens = [row["tokens"] for row in rows]
    flops = _lines(tokens, rows, "flops", 1e9)
    flops.update_layout(title="GFLOP of a sample, forward and backward")
    saved = go.Figure()
    saved.add_scatter(x=tokens, y=[100 * row["flops_saved"] for row in rows], name="FLOPs, our count", line_color=BLUE)
    stated = [row for row in rows if row["paper_flops_saved"] is not None]
    if stated:
        saved.add_scatter(
            x=[row["tokens"] for row in stated],
            y=[100 * row["paper_flops_saved"] for row in stated],
            name="FLOPs, the paper",
            mode="markers",
            marker={"color": GREY, "symbol": "x", "size": 11},
        )
    saved.update_layout(title="Share of CLIP's that LIFT saves, %")
    drawn = [flops, saved]
    if rows[0]["lift_memory"] is not None:
        saved.add_scatter(
            x=tokens, y=[100 * r["memory_saved"] for r in rows], name="memory, ours", line={"color": ORANGE, "dash": "dash"}
        )
        memory = _lines(tokens, rows, "memory", 2**30)
        drawn.append(memory.update_layout(title="Peak memory of a training step, GiB"))
    for figure in drawn:
        figure.update_xaxes(title="caption tokens n")
        figure.update_yaxes(rangemode="tozero", automargin=True)
        figure.update_layout(
            height=400,
            margin={"l": 8, "r": 8, "t": 50, "b": 90},
            title_font_size=15,
            legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        )
    return [figure_fragment(figure, first=number == 0) for number, figure in enumerate(drawn)]


def _lines(tokens: list[int], rows: list[dict[str, Any]], what: str, unit: float) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(x=tokens, y=[row[f"lift_{what}"] / unit for row in rows], name="LIFT", line_color=BLUE)
    figure.add_scatter(
        x=tokens, y=[row[f"clip_{what}"] / unit for row in rows], name="CLIP", line={"color": ORANGE, "dash": "dash"}
    )
    return figure


def _as_json(
    settings: CostSettings, lift: LiftRecipe, clip: ClipRecipe, rows: list[dict[str, Any]], memory: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "definition": DEFINITION,
        "memory_definition": MEMORY_DEFINITION,
        "memory": memory or NOT_MEASURED,
        "units": {"flops": "FLOP of one sample", "memory": "bytes", "saved, difference": "fraction"},
        "lift": {"recipe": None if settings.lift is None else str(settings.lift)} | to_plain(asdict(lift)),
        "clip": {"recipe": None if settings.clip is None else str(settings.clip)} | to_plain(asdict(clip)),
        "torch": torch.__version__,
        "rows": rows,
    }


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _describe(path: Path | None, recipe: LiftRecipe | ClipRecipe) -> str:
    vision = recipe.vision
    side = (
        f"head of width {recipe.embedding_dim}"
        if isinstance(recipe, LiftRecipe)
        else f"text tower of width {recipe.text.width}, {recipe.text.layers} layers, vocabulary {recipe.text.vocabulary_size}, "
        f"joint space of {recipe.text.embedding_dim}"
    )
    return (
        f"{path or 'the paper'}: ViT of width {vision.width}, {vision.layers} layers, patches of {vision.patch_size}, "
        f"{vision.image_size} pixels; {side}"
    )
