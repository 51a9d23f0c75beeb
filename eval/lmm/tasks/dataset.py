"""The folder in which lmms-eval finds a data set without a network: tables of question rows come in, Parquet files go out.

lmms-eval asks the `datasets` library for a repository by name; a folder of that name in the working directory answers first.
One folder `OUT` holds any number of repositories, and a repository any number of configs (MMBench: `en` and `cn`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lift.common.errors import UserError
from lift.common.files import atomic_folder, require_file, write_text
from lift.common.images import ImageFault, decode_image

if TYPE_CHECKING:
    from PIL import Image

Columns = Mapping[str, Any]
"""Name -> `string`, `int64`, `bool`, `float64` or `image`; a list of one type; or a mapping of names to types."""

WRITTEN_BY = "Written by lift-eval data."
"""Line of the README of a repository folder: only such folders are ever changed."""

_ROW_GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TaskSource:
    """Where lmms-eval's task reads its data, from the task's own YAML."""

    repository: str
    config: str
    split: str


@dataclass(frozen=True)
class Table:
    """What one config of a repository will hold."""

    source: TaskSource
    columns: Columns
    rows: Iterable[Mapping[str, Any]]
    """Columns missing in a row are null. An image is encoded bytes, known to decode, or the path of a file."""


def image_hash(image: Image.Image) -> str:
    """SHA-256 of the width, the height and the RGB pixels: the same for every encoding of the same picture."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


class _TaskLoader(yaml.SafeLoader):
    """lmms-eval's YAML names functions with a tag of its own; here they stay names."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def lmms_eval_folder() -> Path:
    """Of the installed package, without importing it. Raises UserError when it is not installed."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.submodule_search_locations is None:
        raise UserError("lmms-eval is not installed. Install the evaluation extra: pip install 'lift-toolkit[eval]'.")
    return Path(spec.submodule_search_locations[0])


def task_source(lmms_task: str) -> TaskSource:
    """Of lmms-eval's own task. Raises UserError when lmms-eval, or its task, is not there."""
    tasks = lmms_eval_folder() / "tasks"
    files = sorted(tasks.glob(f"*/{lmms_task}.yaml"))
    if len(files) != 1:
        raise UserError(f"{tasks}: expected the task {lmms_task} of lmms-eval 0.7.3, found {len(files)}. Install that version.")
    config = _load_task_yaml(files[0])
    return TaskSource(config["dataset_path"], config.get("dataset_name", "default"), config["test_split"])


def _load_task_yaml(path: Path) -> dict[str, Any]:
    config = yaml.load(require_file(path, "a task of lmms-eval").read_text(encoding="utf-8"), Loader=_TaskLoader)
    if "include" in config:
        config = _load_task_yaml(path.parent / config["include"]) | config
    return config


def check_repository_folder(folder: Path) -> None:
    """Raises UserError when `folder` is there and was not written by `write_tables`, whose contents it would lose."""
    readme = folder / "README.md"
    if folder.exists() and not (readme.is_file() and WRITTEN_BY in readme.read_text(encoding="utf-8", errors="replace")):
        raise UserError(
            f"{folder}: expected nothing, or a data folder of lift-eval data, found other files. Choose another --out."
        )


def write_tables(tables: Sequence[Table], out: Path) -> list[int]:
    """Writes `out/<repository>/`: a README that lists configs and splits, and one Parquet file a config. Atomic.

    Other configs that the folder already holds stay. Rows keep their order; images are read one row group at a time.

    Returns:
        Number of rows of each table.
    Raises:
        UserError: an image that does not decode, no rows, a foreign folder in the place of the repository's.
    """
    (repository,) = {table.source.repository for table in tables}
    check_repository_folder(out / repository)
    counts = []
    with atomic_folder(out / repository) as work:
        configs = _keep_configs(out / repository, work, leave_out={table.source.config for table in tables})
        for table in tables:
            source = table.source
            file = f"{source.config}/{source.split}-00000-of-00001.parquet"
            (work / source.config).mkdir()
            counts.append(_write_parquet(table, work / file))
            configs.append({"config_name": source.config, "data_files": [{"split": source.split, "path": file}]})
        listing = yaml.safe_dump({"configs": configs}, sort_keys=False)
        write_text(work / "README.md", f"---\n{listing}---\n{WRITTEN_BY}\n")
    return counts


def _keep_configs(old: Path, work: Path, leave_out: set[str]) -> list[dict[str, Any]]:
    if not old.exists():
        return []
    listing = yaml.safe_load((old / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    kept = [config for config in listing["configs"] if config["config_name"] not in leave_out]
    for config in kept:
        for name in [each["path"] for each in config["data_files"]]:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old / name, work / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(old / name, work / name)
    return kept


def _write_parquet(table: Table, path: Path) -> int:
    import pyarrow.parquet
    from datasets import Features

    schema = Features({name: _feature(kind) for name, kind in table.columns.items()}).arrow_schema
    image_columns = [name for name, kind in table.columns.items() if kind in ("image", ["image"])]
    group: list[dict[str, Any]] = []
    count = size = 0
    decoded: set[Path] = set()
    # Rows of one image lie together (POPE, MME): a dictionary as large as a row group stores their image once.
    with pyarrow.parquet.ParquetWriter(path, schema, dictionary_pagesize_limit=2 * _ROW_GROUP_BYTES) as writer:
        for row in table.rows:
            cells: dict[str, Any] = {name: row.get(name) for name in table.columns}
            for name in image_columns:
                if isinstance(cells[name], list):
                    cells[name] = [_read_image(image, decoded) for image in cells[name]]
                    size += sum(len(image["bytes"]) for image in cells[name])
                elif cells[name] is not None:
                    cells[name] = _read_image(cells[name], decoded)
                    size += len(cells[name]["bytes"])
            group.append(cells)
            count += 1
            if size > _ROW_GROUP_BYTES:
                writer.write_table(_arrow_table(group, schema, table.source))
                group, size = [], 0
        if group:
            writer.write_table(_arrow_table(group, schema, table.source))
    if not count:
        raise UserError(f"{table.source.repository}: expected question rows, found none.")
    return count


def _arrow_table(rows: list[dict[str, Any]], schema: Any, source: TaskSource) -> Any:
    import pyarrow as pa

    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"{source.repository}: a question has a value of another type than the published ones: {error}"
        ) from error


def _read_image(image: bytes | Path, decoded: set[Path]) -> dict[str, Any]:
    """The encoded image as the `datasets` library stores it."""
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    content = image.read_bytes()
    if image not in decoded:
        try:
            decode_image(content)
        except ImageFault as error:
            raise UserError(f"{image}: expected an image, but it cannot be decoded: {error}") from error
        decoded.add(image)
    return {"bytes": content, "path": image.name}


def _feature(kind: Any) -> Any:
    from datasets import Image as ImageFeature
    from datasets import List, Value

    if isinstance(kind, Mapping):
        return {name: _feature(inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return List(_feature(kind[0]))
    return ImageFeature() if kind == "image" else Value(kind)
