"""MMBench (arXiv 2307.06281), English and Chinese: the published TSV with base64 images, and the record of a row.

The answer rule is VLMEvalKit's exact matching (`eval.mmbench.parse_answer`): nothing is guessed, and no judge is asked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.lmm.tasks.dataset import Table, task_source
from eval.lmm.tasks.published import Published, Source
from eval.mmbench import OPTION_LETTERS, ROTATION_STRIDE, TAXONOMY, official_name, parse_answer
from eval.records import Record
from lift.common.errors import UserError
from lift.common.files import require_file
from lift.common.images import ImageFault, decode_image

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("index", "question", "A", "B", "answer", "category", "image", "l2-category")
_TEXTS = ("question", "hint", *OPTION_LETTERS, "answer", "category", "source", "L2-category", "comment", "split")
COLUMNS = {"index": "int64"} | dict.fromkeys(_TEXTS, "string") | {"image": "image"}

_L2_OF_L3 = {l3: l2 for l2_names in TAXONOMY.values() for l2, l3_names in l2_names.items() for l3 in l3_names}
_L1_OF_L2 = {l2: l1 for l1, l2_names in TAXONOMY.items() for l2 in l2_names}


def options(doc: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> text of the options that are filled; lmms-eval, too, takes the word "nan" for an empty cell."""
    return {letter: doc[letter] for letter in OPTION_LETTERS if doc.get(letter) not in (None, "", "nan")}


def letters(doc: Mapping[str, Any]) -> list[str]:
    return list(options(doc))


def record(task: str, doc: Mapping[str, Any], response: str, images: Sequence[str]) -> Record:
    """Categories are the official names; L2 and L1 that a row does not name follow from the official table."""
    its_options, index, hint = options(doc), int(doc["index"]), doc.get("hint")
    prediction = parse_answer(response, its_options)
    l3 = official_name(doc.get("category") or "")
    l2 = official_name(doc.get("L2-category") or "") or _L2_OF_L3.get(l3)
    levels = {"l1": _L1_OF_L2.get(l2 or ""), "l2": l2, "l3": l3}
    return Record(
        task=task,
        key=str(index),
        group=str(index % ROTATION_STRIDE),
        rotation=index // ROTATION_STRIDE,
        categories={level: name for level, name in levels.items() if name},
        question=doc["question"] if hint in (None, "", "nan") else f"{hint} {doc['question']}",
        options=its_options,
        answer=[doc["answer"]],
        response=response,
        prediction=prediction,
        score=float(prediction == doc["answer"]),
        images=list(images),
    )


def read(lmms_task: str, source: Source) -> Published:
    """An MMBench TSV (also .xlsx) with base64 images."""
    if source.images is not None:
        raise UserError("--images: MMBench's images are in its TSV; leave the option out.")
    rows = read_questions(source.path)
    flat = (row | row["options"] | {"L2-category": row["l2_category"]} for row in rows)
    return Published([Table(task_source(lmms_task), COLUMNS, flat)])


def read_table(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """The file as strings, empty cells as "", column names lower-cased except the option letters.

    Raises:
        UserError: unreadable, a missing column, no rows.
    """
    import pandas as pd

    require_file(path, "an MMBench file")
    try:
        # Only empty cells are missing: "None" and "NA" are options in MMBench. (lmms-eval itself drops the word "nan".)
        read = pd.read_excel if path.suffix == ".xlsx" else pd.read_csv
        table = read(path, dtype=str, keep_default_na=False, **({} if path.suffix == ".xlsx" else {"sep": "\t"}))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: expected a table in MMBench's form, but it cannot be read: {error}") from error
    table.columns = [str(name) if name in OPTION_LETTERS else str(name).lower() for name in table.columns]
    if missing := [name for name in required if name not in table.columns]:
        raise UserError(f"{path}: expected the column '{missing[0]}', found {', '.join(table.columns)}.")
    if table.empty:
        raise UserError(f"{path}: expected question rows, found none.")
    return table


def question_fields(table: pd.DataFrame, path: Path) -> list[dict[str, Any]]:
    """Index, question, hint, options, answer and categories of every row.

    Raises:
        UserError: an index that is no number or occurs twice, an answer that names no option.
    """
    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    for number, cells in enumerate(table.to_dict("records"), start=2):
        where = f"{path}: row {number}"
        if not cells["index"].removesuffix(".0").isdigit():
            raise UserError(f"{where}: expected a number as index, found '{cells['index']}'.")
        index = int(cells["index"].removesuffix(".0"))
        if index in seen:
            raise UserError(f"{where}: index {index} occurs twice. Give every row its own index.")
        seen.add(index)
        filled = options(cells)
        if cells["answer"] not in filled:
            raise UserError(
                f"{where} (index {index}): answer '{cells['answer']}' names no option; filled are {', '.join(filled)}."
            )
        hint = cells.get("hint", "")
        rows.append(
            {
                "index": index,
                "question": cells["question"],
                "hint": None if hint in ("", "nan") else hint,
                "options": filled,
                "answer": cells["answer"],
                "category": cells.get("category") or None,
                "l2_category": cells.get("l2-category") or None,
            }
        )
    return rows


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows of an MMBench TSV: what `question_fields` gives, `image` (encoded bytes), `image_sha256` (of these bytes), `source`,
    `comment`, `split`.

    An image cell may instead name the index of the row that holds the image, as MMBench's own files do.

    Raises:
        UserError: what `read_table` and `question_fields` raise, an image that cannot be decoded, a rotation without its
            first pass or with a gap before it.
    """
    table = read_table(path, REQUIRED)
    rows = question_fields(table, path)
    _check_rotations(rows, path)
    cell_by_index = {str(row["index"]): cell for row, cell in zip(rows, table["image"], strict=True)}
    _take_categories_of_first_passes(rows)
    optional = [
        {name: cells.get(name) or None for name in ("source", "comment", "split")} for cells in table.to_dict("records")
    ]
    hash_by_cell: dict[str, tuple[bytes, str]] = {}
    for number, (row, extra) in enumerate(zip(rows, optional, strict=True), start=2):
        cell = cell_by_index[str(row["index"])]
        cell = cell_by_index.get(cell, cell)
        if cell not in hash_by_cell:
            hash_by_cell[cell] = _decode_image(cell, f"{path}: row {number} (index {row['index']})")
        row["image"], row["image_sha256"] = hash_by_cell[cell]
        row.update(extra)
    return rows


def _take_categories_of_first_passes(rows: list[dict[str, Any]]) -> None:
    """Files may name the categories in the first pass only; a question's rotations are of the same ones."""
    names = ("category", "l2_category")
    of_group = {row["index"]: {name: row[name] for name in names} for row in rows if row["index"] < ROTATION_STRIDE}
    for row in rows:
        for name in names:
            row[name] = row[name] or of_group[row["index"] % ROTATION_STRIDE][name]


def _check_rotations(rows: list[dict[str, Any]], path: Path) -> None:
    """A group's passes are 0, 1, 2, ...; how many is the file's matter (MMBench has three for some of four)."""
    passes: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        passes[row["index"] % ROTATION_STRIDE].add(row["index"] // ROTATION_STRIDE)
    for number, row in enumerate(rows, start=2):
        group, rotation = row["index"] % ROTATION_STRIDE, row["index"] // ROTATION_STRIDE
        missing = set(range(rotation)) - passes[group]
        if missing:
            before = min(missing) * ROTATION_STRIDE + group
            raise UserError(f"{path}: row {number}: index {row['index']} is a rotation of {group}, but {before} is not there.")


def _decode_image(cell: str, where: str) -> tuple[bytes, str]:
    try:
        content = base64.b64decode(cell, validate=True)
        decode_image(content)
    except (binascii.Error, ImageFault) as error:
        raise UserError(f"{where}: expected a base64 JPEG or PNG image, but it cannot be decoded: {error}") from error
    return content, hashlib.sha256(content).hexdigest()
