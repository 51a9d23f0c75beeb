"""Tables as text: an .xlsx, .tsv or .csv file comes in, one dict of strings a row goes out, images left aside."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

from lift.common.errors import UserError

IMAGES = ("image", "images", "image_base64")


def read_cells(path: Path) -> list[dict[str, str]]:
    """Empty cells are ""; column names are lower-cased except single letters, which name options.

    Only empty cells are missing: "None" and "NA" are options in MMBench.

    Raises:
        UserError: unreadable, two columns of one name, no rows.
    """
    import pandas as pd

    options: dict[str, object] = {"dtype": str, "keep_default_na": False}
    try:
        if zipfile.is_zipfile(path):
            table = pd.read_excel(path, **options)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
            separator = "\t" if "\t" in header else ","
            kept = [name for name in next(csv.reader([header], delimiter=separator)) if name.lower() not in IMAGES]
            table = pd.read_csv(path, sep=separator, usecols=kept, encoding="utf-8-sig", **options)
    except (ValueError, OSError, KeyError, StopIteration, csv.Error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a table (.xlsx, .tsv or .csv), but it cannot be read: {error}") from error
    names = [name if len(name) == 1 and name.isupper() else name.lower() for name in map(str, table.columns)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: expected each column once, found '{twice}' twice.")
    table.columns = names
    table = table[[name for name in names if name not in IMAGES]]
    if table.empty:
        raise UserError(f"{path}: expected an answer file or a table with rows, found only the line {names}.")
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.fillna("").to_dict("records")]
