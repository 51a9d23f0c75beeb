"""Conversations in a Hugging Face `datasets` table: columns `messages` (role, content) and `images`, as TRL and others use.

In: a folder saved by `save_to_disk`, or one of parquet or arrow files. Out: rows as plain dicts, their images still encoded.
The table is memory-mapped arrow; no network is asked.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lift.common.errors import UserError, first_line

SAVED_TO_DISK = ("state.json", "dataset_dict.json")
READERS = {".parquet": "parquet", ".arrow": "arrow"}
COLUMNS = ("messages", "conversations")
IMAGE_COLUMNS = ("images", "image")


class TableRows:
    """Rows of a table; only its path is sent to other processes.

    Raises:
        UserError: the folder holds no table that `datasets` can load, no such split, or no column of conversations.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split, self.name = path, split, str(path)
        columns = _table(path, split).column_names
        if not any(column in columns for column in COLUMNS):
            raise UserError(
                f"{path}: expected a table with a column `messages` (role, content), found the columns {', '.join(columns)}. "
                "Rename the column that holds the conversations."
            )
        if not len(self):
            raise UserError(f"{path}: expected a non-empty table of conversations; the split {split} has no rows.")

    def __len__(self) -> int:
        return len(_table(self.path, self.split))

    def __getitem__(self, number: int) -> dict[str, Any]:
        (row,) = _table(self.path, self.split)[number : number + 1].to_pylist()
        # a table has every column in every row; for a row of LLaVA's format an absent key means text only
        return {key: value for key, value in row.items() if value is not None}


def table_identity(rows: TableRows, batch: int = 1000) -> dict[str, Any]:
    """As `describe_sources` gives it: the hash of all text, and that of the names and lengths of the images.

    The images are not read; arrow knows their lengths.
    """
    text, sizes, images = hashlib.sha256(), hashlib.sha256(), 0
    table = _table(rows.path, rows.split)
    for start in range(0, len(table), batch):
        part = table[start : start + batch]
        named = [column for column in IMAGE_COLUMNS if column in part.column_names]
        for row in part.drop_columns(named).to_pylist():
            text.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
        for column in named:
            lines, counts = _image_lines(part[column].combine_chunks())
            images += len(lines)
            sizes.update(json.dumps([column, lines, counts]).encode())
    return {"annotations_sha256": text.hexdigest(), "images": images, "images_sha256": sizes.hexdigest()}


def _image_lines(column: Any) -> tuple[list[str], list[int | None]]:
    """Name and length in bytes of each image of an arrow column, and the number of images in each row (None: no list)."""
    counts: list[int | None] = []
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        counts, column = pc.list_value_length(column).to_pylist(), column.flatten()
    if not pa.types.is_struct(column.type):
        return [str(name) for name in column.to_pylist() if name is not None], counts
    names, lengths = (pc.struct_field(column, name) for name in ("path", "bytes"))
    pairs = zip(names.to_pylist(), pc.binary_length(lengths).to_pylist(), strict=True)
    return [f"{name} {length}" for name, length in pairs if (name, length) != (None, None)], counts


@lru_cache(maxsize=8)
def _table(path: Path, split: str) -> Any:
    """A `datasets.Dataset` that gives arrow tables, so that nothing decodes images or guesses types."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: reading a table needs the package datasets. Run: pip install datasets") from error
    try:
        if any((path / name).is_file() for name in SAVED_TO_DISK):
            loaded: Any = datasets.load_from_disk(str(path))
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = _load_files(path, split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{path}: datasets cannot load the split {split}: {first_line(error)}. Check the folder and `split`."
        ) from error
    return loaded.with_format("arrow")


def _load_files(path: Path, split: str) -> Any:
    """The files of the folder whose names start with the split's, as on the hub; all of them when none does."""
    import datasets

    for suffix, reader in READERS.items():
        files = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
        if files:
            named = [file for file in files if file.name.startswith(split) or file.parent.name == split]
            return datasets.load_dataset(reader, data_files=[str(file) for file in named or files], split="train")
    raise UserError(
        f"{path}: expected conversations: a JSON or JSON-lines file, or a folder saved by datasets or with parquet or arrow "
        "files; found a folder without them. Check the path."
    )
