"""MMBench files: a TSV comes in, checked question rows go out, or the folder in which lmms-eval finds the data set offline.

lmms-eval asks the `datasets` library for a repository by name; a folder of that name in the working directory answers first.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from eval.mmbench import OPTION_LETTERS, ROTATION_STRIDE
from eval.settings import DataSettings, given
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, require_file, write_text
from lift.common.images import ImageFault, decode_image

TASK = "mmbench_en_dev_static"
REQUIRED = ("index", "question", "A", "B", "answer", "category", "image", "l2-category")
_COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "L2-category",
    "comment",
    "split",
)


@dataclass(frozen=True)
class TaskSource:
    """Where lmms-eval's task reads its data, from the task's own YAML."""

    repository: str
    config: str
    split: str


def data(settings: DataSettings) -> None:
    """Command `lift-eval data`."""
    out, source = given(settings.out, "out"), task_source()
    check_output_folder(out, f"{source.repository}/README.md")
    rows = read_questions(settings.file)
    with atomic_folder(out) as work:
        write_dataset(rows, work, source)
    print(f"{out}: {len(rows)} rows for lmms-eval's task {TASK}; run it in this folder with HF_HUB_OFFLINE=1.")


def read_table(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """The file as strings, empty cells as "", column names lower-cased except the option letters.

    Raises:
        UserError: unreadable, a missing column, no rows.
    """
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
        options = {letter: cells[letter] for letter in OPTION_LETTERS if cells.get(letter, "") not in ("", "nan")}
        if cells["answer"] not in options:
            raise UserError(
                f"{where} (index {index}): answer '{cells['answer']}' names no option; filled are {', '.join(options)}."
            )
        hint = cells.get("hint", "")
        rows.append(
            {
                "index": index,
                "question": cells["question"],
                "hint": None if hint in ("", "nan") else hint,
                "options": options,
                "answer": cells["answer"],
                "category": cells.get("category") or None,
                "l2_category": cells.get("l2-category") or None,
            }
        )
    return rows


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows of an MMBench TSV, ready for `write_dataset` and `mmbench.record`: adds `image` (encoded bytes) and `image_sha256`.

    An image cell may instead name the index of the row that holds the image, as MMBench's own files do.

    Raises:
        UserError: what `read_table` and `question_fields` raise, an image that cannot be decoded, a rotation without its
            first pass.
    """
    table = read_table(path, REQUIRED)
    rows = question_fields(table, path)
    cell_by_index = {str(row["index"]): cell for row, cell in zip(rows, table["image"], strict=True)}
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
        group = row["index"] % ROTATION_STRIDE
        if str(group) not in cell_by_index:
            raise UserError(f"{path}: row {number}: index {row['index']} is a rotation of {group}, which is not there.")
    return rows


def _decode_image(cell: str, where: str) -> tuple[bytes, str]:
    try:
        content = base64.b64decode(cell, validate=True)
        decode_image(content)
    except (binascii.Error, ImageFault) as error:
        raise UserError(f"{where}: expected a base64 JPEG or PNG image, but it cannot be decoded: {error}") from error
    return content, hashlib.sha256(content).hexdigest()


class _TaskLoader(yaml.SafeLoader):
    """lmms-eval's YAML names functions with a tag of its own; here they stay names."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def task_source(task: str = TASK) -> TaskSource:
    """Reads the installed task's YAML without importing lmms-eval. Raises UserError when lmms-eval is not installed."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.submodule_search_locations is None:
        raise UserError("lmms-eval is not installed. Install the evaluation extra: pip install 'lift-toolkit[eval]'.")
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / "mmbench"
    config = _load_task_yaml(folder / f"{task}.yaml")
    return TaskSource(config["dataset_path"], config["dataset_name"], config["test_split"])


def _load_task_yaml(path: Path) -> dict[str, Any]:
    config = yaml.load(require_file(path, "a task of lmms-eval").read_text(encoding="utf-8"), Loader=_TaskLoader)
    if "include" in config:
        config = _load_task_yaml(path.parent / config["include"]) | config
    return config


def write_dataset(rows: list[dict[str, Any]], folder: Path, source: TaskSource) -> None:
    """Writes `folder/<repository>/` with a README that lists the split and one Parquet file, in the order of `rows`."""
    import pyarrow.parquet
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in _COLUMNS}
    columns["L2-category"] = [row["l2_category"] for row in rows]
    columns["image"] = [{"bytes": row["image"], "path": None} for row in rows]
    for letter in OPTION_LETTERS:
        columns[letter] = [row["options"].get(letter) for row in rows]
    features = Features({name: Value("string") for name in _COLUMNS} | {"index": Value("int64"), "image": ImageFeature()})
    repository = folder / source.repository
    (repository / source.config).mkdir(parents=True)
    file = f"{source.config}/{source.split}-00000-of-00001.parquet"
    pyarrow.parquet.write_table(Dataset.from_dict(columns, features=features).data.table, repository / file)
    listing = {"configs": [{"config_name": source.config, "data_files": [{"split": source.split, "path": file}]}]}
    write_text(repository / "README.md", f"---\n{yaml.safe_dump(listing, sort_keys=False)}---\n")
