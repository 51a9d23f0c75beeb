"""`lift-eval text`: two text encoders and sentence pairs come in; how each follows words and how each follows meaning goes out.

After the LIFT paper's section on the syntactic homogeneity of CLIP's text encoder (arXiv 2506.04209): an encoder that follows
words finds "a dog chases a cat" and "a cat chases a dog" alike, and two paraphrases with no word in common unlike. Written are
text.json, pairs.csv (a row for each pair) and scatter.html (one self-contained page).
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from eval.output import format_table
from eval.settings import TextSettings
from eval.text.measure import READING, analyse, as_csv, auc_rows, kind_cells, measure, number
from eval.text.mining import Limits, mine
from eval.text.page import scatter_page
from eval.text.pairs import BUILT_IN, Pair, read_captions, read_pairs
from eval.text.sides import open_text_encoder
from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import check_output_folder, sha256_file, write_json, write_text

PRINTED = 5
"""Pairs of the first list that the terminal shows."""


def text(settings: TextSettings) -> None:
    """Command `lift-eval text`."""
    out = given(settings.out, "out")
    check_output_folder(out, "text.json")
    # the sentences first: a fault of a file comes before minutes of loading
    captions = None if settings.captions is None else read_captions(settings.captions, settings.captions_format or "lines")
    pairs = [] if captions else read_pairs(settings.pairs or BUILT_IN)
    names = (settings.encoder_a, settings.encoder_b)
    a, b = (open_text_encoder(name, settings.max_length, settings.precision) for name in names)
    source = _source(settings)
    if captions:
        limits = Limits(settings.high_overlap, settings.low_overlap, settings.max_pairs, settings.max_captions, settings.seed)
        mined = mine(captions, limits, [a.encode, b.encode])
        pairs = mined.pairs
        source["mining"] = asdict(limits) | mined.counts
        _check_mined(pairs, settings)
    measured = measure(pairs, a, b, settings.seed)
    encoders = [
        {"label": side.label, "path": name, "hash": side.content_hash} for side, name in zip((a, b), names, strict=True)
    ]
    result = {"encoders": dict(zip("ab", encoders, strict=True)), "source": source}
    circular = captions is not None and captions[0].image is None
    result |= analyse(measured, settings.resamples, settings.seed, circular)
    write_json(out / "text.json", result)
    write_text(out / "pairs.csv", as_csv(measured))
    write_text(out / "scatter.html", scatter_page(measured, result))
    print(summary(result))
    print(f"\n{out}: text.json, pairs.csv, scatter.html")


def _source(settings: TextSettings) -> dict[str, Any]:
    path = settings.captions or settings.pairs or BUILT_IN
    name = "built-in pairs" if path == BUILT_IN else str(path)
    return {"name": name, "hash": sha256_file(path), "mining": None}


def _check_mined(pairs: list[Pair], settings: TextSettings) -> None:
    same = sum(pair.same_meaning for pair in pairs)
    if not 0 < same < len(pairs):
        raise UserError(
            f"{settings.captions}: expected captions close in words and captions far in words, found {len(pairs) - same} "
            f"pairs with an overlap of at least {settings.high_overlap} and {same} of one meaning with at most "
            f"{settings.low_overlap}. "
            "Give more captions, a lower --high_overlap or a higher --low_overlap."
        )


def summary(result: dict[str, Any]) -> str:
    """What the terminal shows."""
    a, b = (result["encoders"][side] for side in "ab")
    counts, rho = result["pairs"], result["spearman"]
    lines = [
        f"A = {a['label']}, B = {b['label']}; {result['source']['name']}: {counts['same_meaning']} pairs of the same meaning, "
        f"{counts['different_meaning']} of different meaning",
        "",
        format_table(
            ["", "A", "B", "words alone"],
            [
                ["rank correlation with word overlap", number(rho["a_overlap"]), number(rho["b_overlap"]), ""],
                *auc_rows(result),
            ],
        ),
        "",
        f"Rank correlation of A and B: {number(rho['a_b'])}.",
    ]
    if isinstance(result["auc"], str):
        lines.append(f"AUC {result['auc']}.")
    else:
        difference = result["auc"]["a_minus_b"]
        low, high = difference["interval"]
        lines.append(f"AUC A - B: {difference['value']:+.3f} (95 % interval {low:+.3f} to {high:+.3f}).")
        lines += textwrap.wrap(f"AUC: {READING}", 110)
    header = ["kind", "meaning", "n", "overlap", "similarity A", "similarity B", "AUC A", "AUC B"]
    lines += [
        "",
        format_table(header, kind_cells(result["kinds"])),
        "",
        "Where A and B differ most (rank among the pairs, A and B):",
    ]
    for row in result["lists"]["most_different"][:PRINTED]:
        meaning = "same" if row["same_meaning"] else "different"
        lines.append(f"  {row['rank_a']:.2f} {row['rank_b']:.2f}  {meaning}: {row['first']} | {row['second']}")
    return "\n".join(lines)
