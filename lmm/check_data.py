"""`lmm check-data`: what is wrong with conversations and images, and how long the samples are, before a run finds out.

In: a recipe, or a file with its images and a tokenizer. Out: a report on standard output, with --out also `report.json` and
`dropped.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lift.common.errors import UserError
from lift.common.files import write_json
from lift.common.ledger import DropLedger
from lmm.data import TOO_LONG, Check, check_rows
from lmm.recipes import open_choice
from lmm.rows import Rows, content_digest, image_names
from lmm.settings import CheckDataSettings, StageSettings

NAMED = 3
"""Faulty samples named on standard output for each cause."""
BAR = 40
"""Columns of the longest bar of the histogram."""


def check_data(settings: CheckDataSettings) -> dict[str, Any]:
    """Prints and returns the report.

    Raises:
        UserError: unusable recipe, file or tokenizer; or a larger share of the samples than max_drop_fraction is faulty.
    """
    choice = open_choice(settings, settings.tokens_per_image, settings.decode, StageSettings.max_length)
    checks = check_rows(choice.rows, choice.encoder, settings.workers, decode=settings.decode)
    ledger = DropLedger()
    for number, check in enumerate(checks):
        if check.cause:
            ledger.drop(choice.rows[number].key, check.cause, check.detail)
    report = _report(choice.rows, checks, ledger, choice.max_length)
    print(_text(report, ledger))
    if settings.out is not None:
        write_json(settings.out / "report.json", report)
        ledger.write(settings.out / "dropped.jsonl")
    limit = choice.max_drop_fraction if settings.max_drop_fraction is None else settings.max_drop_fraction
    if len(ledger) > limit * len(checks):
        where = f"{settings.out / 'dropped.jsonl'} lists them" if settings.out else "--out FOLDER lists all of them"
        raise UserError(
            f"{settings.data or settings.recipe}: {len(ledger)} of {len(checks)} samples cannot be used, more than "
            f"max_drop_fraction={limit:g} allows. {where}; mend the data, or raise --max_drop_fraction."
        )
    return report


def _report(rows: Rows, checks: list[Check], ledger: DropLedger, max_length: int) -> dict[str, Any]:
    lengths = np.array([check.length for check in checks if check.length], dtype=np.int64)
    usable = [check for check in checks if not check.cause]
    names: Counter[str] = Counter()
    contents: Counter[bytes] = Counter()
    images: set[bytes] = set()
    for row in rows:
        names[str(row.value.get("id", "")) if isinstance(row.value, dict) else ""] += 1
        contents[content_digest(row.value)] += 1
        images.update(content_digest(name) for name in image_names(row.value))
    names.pop("", None)
    report: dict[str, Any] = {
        "samples": len(checks),
        "usable": len(usable),
        "with_images": sum(check.images > 0 for check in checks),
        "distinct_image_names": len(images),
        "faults": ledger.counts(),
        "repeated_ids": sum(count - 1 for count in names.values()),
        "repeated_samples": sum(count - 1 for count in contents.values()),
    }
    if len(lengths):
        counts, edges = histogram(lengths)
        report |= {
            "usable_tokens": sum(check.length - check.cut for check in usable),
            "supervised_tokens": sum(check.supervised for check in usable),
            "length_percentiles": {str(p): int(np.percentile(lengths, p)) for p in (0, 5, 50, 95, 99, 100)},
            "length_histogram": {"edges": edges, "samples": counts},
            "max_length": max_length,
            "cut": sum(check.cut > 0 for check in checks),
            "share_over_max_length": round(sum(check.cause == TOO_LONG or check.cut > 0 for check in checks) / len(checks), 6),
        }
    return report


def histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """Samples by length in bins whose bounds double from 32; `counts[i]` have `edges[i] <= length < edges[i + 1]`.

    Args:
        lengths: integers [samples], at least one, in tokens.
    """
    top = max(int(np.ceil(np.log2(int(lengths.max()) + 1))), 6)
    edges = [0, *(2**power for power in range(5, top + 1))]
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1] - 0.5])  # numpy counts the last bound too
    return counts.tolist(), edges


def _text(report: dict[str, Any], ledger: DropLedger) -> str:
    lines = [
        f"samples            {report['samples']}, of them usable {report['usable']}",
        f"with images        {report['with_images']} ({report['distinct_image_names']} distinct names)",
        f"repeated           {report['repeated_ids']} ids, {report['repeated_samples']} samples with the same content (kept)",
    ]
    named: Counter[str] = Counter()
    for cause, count in ledger.counts().items():
        lines.append(f"fault              {count} {cause}")
        for key, other, detail in ledger.rows():
            if other == cause and named[cause] < NAMED:
                named[cause] += 1
                lines.append(f"                     {key!r} {detail!r}")
    if "usable_tokens" in report:
        share, limit = report["supervised_tokens"] / max(report["usable_tokens"], 1), report["max_length"]
        lines += [
            f"tokens             {report['usable_tokens']} in usable samples",
            f"supervised tokens  {report['supervised_tokens']} ({share:.1%})",
            f"over max_length    {report['share_over_max_length']:.2%} of the samples (max_length {limit})",
            f"cut there          {report['cut']}",
            "length percentiles " + ", ".join(f"{p}%: {value}" for p, value in report["length_percentiles"].items()),
        ]
        counts, edges = report["length_histogram"]["samples"], report["length_histogram"]["edges"]
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            bar = "#" * -(-BAR * count // max(counts))
            lines.append(f"{low:>8} - {high - 1:<8} {count:>9} {bar}")
    return "\n".join(lines)
