"""What `lift-eval lmm` prints of a finished task: accuracy overall and per category, by each way of counting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from eval.output import format_table, percent
from eval.records import Record


def summary_table(records: Sequence[Record], lmms_eval: Mapping[str, float | None] | None) -> str:
    """Percentages. Where questions come in several circular passes, a question is right when all of its passes are.

    Args:
        lmms_eval: lmms-eval's own numbers; those named `overall`, `l2/NAME`, `l3/NAME` get a column, the others a line.
    """
    by_name: dict[tuple[str, str], list[Record]] = {("overall", ""): list(records)}
    levels = list(dict.fromkeys(level for record in records for level in record.categories))
    for level in levels:
        of_level = defaultdict(list)
        for record in records:
            if level in record.categories:
                of_level[record.categories[level]].append(record)
        by_name |= {(level, name): of_level[name] for name in sorted(of_level)}
    circular = any(record.rotation for record in records)
    chosen = any(record.likelihood for record in records)
    theirs = dict(lmms_eval or {})
    static = "overall" in theirs
    header = [records[0].task, *(["questions"] if circular else []), "rows"]
    header += ["circular %", "first pass %"] if circular else ["accuracy %"]
    header += ["likelihood %"] if chosen else []
    header += ["lmms-eval %"] if static else []
    rows = []
    for (level, name), its_records in by_name.items():
        rows.append([f"{level} {name}".strip(), *_cells(its_records, circular, chosen)])
        if static:
            rows[-1].insert(-1, percent(theirs.pop("overall" if level == "overall" else f"{level}/{name}", None)))
    table = format_table([*header, "unparsed %"], rows)
    other = ", ".join(f"{name} {value:.4f}" for name, value in theirs.items() if value is not None)
    return f"{table}\nlmms-eval's own scoring: {other}" if other else table


def _cells(records: Sequence[Record], circular: bool, chosen: bool) -> list[str]:
    scores = [record.score for record in records]
    by_likelihood = [record.likelihood.score if record.likelihood else 0.0 for record in records]
    cells = [str(len(records))]
    if circular:
        first = [record.score for record in records if record.rotation == 0]
        groups = _all_passes(records, scores)
        cells = [str(len(groups)), *cells, percent(fmean(groups)), percent(fmean(first) if first else None)]
        by_likelihood = _all_passes(records, by_likelihood)
    else:
        cells.append(percent(fmean(scores)))
    cells += [percent(fmean(by_likelihood))] if chosen else []
    return [*cells, percent(fmean(record.prediction is None for record in records))]


def _all_passes(records: Sequence[Record], scores: Sequence[float]) -> list[float]:
    """Score of each group: the lowest of its passes."""
    groups: dict[str, float] = {}
    for record, score in zip(records, scores, strict=True):
        groups[record.group] = min(groups.get(record.group, 1.0), score)
    return list(groups.values())
