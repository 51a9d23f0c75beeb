"""The layout of the official LIFT code: parquet files of captions, and for each of them a folder of images of its name.

A caption file has the columns `key`, `re_caption` (long, recaptioned), `org_caption` (short, from the web) and `extension`;
the image of a row is IMAGES/STEM/KEY.EXTENSION, where STEM is the name of the caption file.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from lift.common.errors import UserError
from lift.settings import SourceSettings
from lift.sources import storage
from lift.sources.index import IndexWriter, Origin

DEFAULT_FIELDS = ["re_caption"]
images_apart = True


def origins(source: SourceSettings) -> list[Origin]:
    files = storage.list_files(source.path, ".parquet", "a caption file of the official LIFT layout")
    return [Origin(PurePosixPath(path).stem, path) for path in files]


def fingerprint(source: SourceSettings, origin: Origin) -> str:
    return storage.fingerprint(origin.path)


def scan(source: SourceSettings, origin: Origin, index: IndexWriter) -> None:
    assert source.images is not None
    folder = f"{source.images.rstrip('/')}/{origin.stem}"
    names = _names(folder)
    fields = source.caption_fields or DEFAULT_FIELDS
    try:
        with storage.open_file(origin.path) as file:
            table = pq.ParquetFile(file)
            missing = {"key", *fields} - set(table.schema_arrow.names)
            if missing:
                raise UserError(
                    f"{origin.path}: expected the columns key, {', '.join(fields)}; {', '.join(sorted(missing))} is missing, "
                    f"found {', '.join(table.schema_arrow.names)}. Check data.path and data.caption_fields."
                )
            columns = ["key", *fields, *(["extension"] if "extension" in table.schema_arrow.names else [])]
            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    name = f"{row['key']}.{str(row.get('extension') or 'jpg').removeprefix('.')}"
                    found = f"{folder}/{name}" if name in names else None
                    index.add(f"{source.name}/{origin.stem}/{row['key']}", [row[field] for field in fields], found)
    except pa.ArrowInvalid as error:
        raise UserError(f"{origin.path}: not a whole parquet file: {error}. Fetch it again.") from error


def _names(folder: str) -> set[str]:
    if storage.is_remote(folder):
        return storage.remote_names(folder)
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: expected the images of the caption file of that name, found no such folder.")
    return set(os.listdir(folder))  # noqa: PTH208 (a stat for each of a million images would take minutes)
