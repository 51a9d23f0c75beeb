"""Sentence pairs that set words against meaning: the built-in ones, those of a file, or pairs mined from captions.

Words are lower-cased runs of letters and digits, an apostrophe inside included; the overlap of two sentences is the Jaccard
index of their sets of words. Who did what to whom is not in it: "a dog chases a cat" and "a cat chases a dog" have overlap 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl, require_file

BUILT_IN = Path(__file__).with_name("pairs.json")
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class Pair:
    first: str
    second: str
    same_meaning: bool
    kind: str
    """What was changed (swap, relation, attribute, negation, number), or paraphrase; of mined pairs, how they were found."""


@dataclass(frozen=True)
class Caption:
    text: str
    image: str | None
    """What tells captions of one image from those of others; None where it is not known."""


def words(sentence: str) -> frozenset[str]:
    return frozenset(_WORD.findall(sentence.lower()))


def word_overlap(first: str, second: str) -> float:
    """Jaccard index of the sets of words, in [0, 1]; 0 when neither has a word."""
    a, b = words(first), words(second)
    return len(a & b) / len(a | b) if a or b else 0.0


def read_pairs(path: Path = BUILT_IN) -> list[Pair]:
    """Pairs of a JSON list, or of JSON lines when the name ends in .jsonl.

    Raises:
        UserError: not JSON, a pair without two sentences with words or without `same_meaning`, or no pair of one of the two
            meanings, without which nothing can be told apart.
    """
    what = "sentence pairs"
    rows = read_jsonl(path, what) if path.suffix == ".jsonl" else read_json(path, what)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of sentence pairs, found a {type(rows).__name__}.")
    pairs = [_pair(path, number, row) for number, row in enumerate(rows, start=1)]
    same = sum(pair.same_meaning for pair in pairs)
    if not 0 < same < len(pairs):
        raise UserError(
            f"{path}: expected pairs with same_meaning true and pairs with same_meaning false, found {same} and "
            f"{len(pairs) - same}. Add pairs of the other sort."
        )
    return pairs


def _pair(path: Path, number: int, row: Any) -> Pair:
    row = row if isinstance(row, dict) else {}
    first, second, same, kind = (row.get(name) for name in ("first", "second", "same_meaning", "kind"))
    for name, sentence in (("first", first), ("second", second)):
        if not isinstance(sentence, str) or not words(sentence):
            raise UserError(f"{path}: pair {number}: {name}: expected a sentence with words, found {sentence!r}.")
    if not isinstance(same, bool):
        raise UserError(f"{path}: pair {number}: same_meaning: expected true or false, found {same!r}.")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{path}: pair {number}: kind: expected a word, found {kind!r}.")
    assert isinstance(first, str) and isinstance(second, str)
    return Pair(first, second, same, kind or ("paraphrase" if same else "different"))


def read_captions(path: Path, form: str) -> list[Caption]:
    """Captions with words, in the file's order, white space at their ends removed.

    Args:
        form: lines, jsonl (objects with `caption` and, for all or for none, `image`) or coco.
    Raises:
        UserError: not in that form, or fewer than two captions with words.
    """
    readers = {"lines": _read_lines, "jsonl": _read_jsonl, "coco": _read_coco}
    captions = [Caption(c.text.strip(), c.image) for c in readers[form](path) if words(c.text)]
    if len(captions) < 2:
        raise UserError(f"{path}: expected at least two captions to make pairs of, found {len(captions)} with words.")
    return captions


def _read_lines(path: Path) -> list[Caption]:
    try:
        text = require_file(path, "captions, one a line").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected captions in UTF-8, one a line: {error}") from error
    return [Caption(line, None) for line in text.split("\n")]


def _read_jsonl(path: Path) -> list[Caption]:
    captions = []
    for number, row in enumerate(read_jsonl(path, "captions"), start=1):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
            raise UserError(f"{path}: row {number}: expected an object with the text `caption`, found {str(row)[:80]}.")
        image = row.get("image")
        captions.append(Caption(row["caption"], None if image is None else str(image)))
    known = sum(caption.image is not None for caption in captions)
    if known not in (0, len(captions)):
        raise UserError(f"{path}: expected `image` in every row or in none, found it in {known} of {len(captions)}.")
    return captions


def _read_coco(path: Path) -> list[Caption]:
    content = read_json(path, "COCO captions")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{path}: expected COCO captions with the list 'annotations'. Check --captions_format.")
    captions = []
    for number, row in enumerate(annotations, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str) or row.get("image_id") is None:
            raise UserError(f"{path}: annotation {number}: expected caption and image_id, found {str(row)[:80]}.")
        captions.append(Caption(row["caption"], str(row["image_id"])))
    return captions
