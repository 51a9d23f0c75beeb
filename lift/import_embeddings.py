"""`lift import-embeddings`: embeddings computed elsewhere in, an embedding store out.

Reads the official LIFT layout (folders of parquet files), a `.npy` array or a safetensors tensor with a file of keys. Works
shard by shard; a shard that an interrupted import finished is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.files import locked_folder, require_file, require_folder, sha256_text
from lift.common.ledger import DropLedger
from lift.settings import ImportEmbeddingsSettings
from lift.sources import SHARD_SAMPLES
from lift.sources.webdataset import IMAGE_SUFFIXES
from lift.store import EmbeddingStore, StoreWriter, storable
from lift.text_encoders import describe_without_loading

ROWS_PER_SHARD = 32_768
"""Of an array; half a gigabyte of float32 at 4096 dimensions."""


ReadRows = Callable[[int, int], np.ndarray]
"""Rows [first, end) as float32."""


@dataclass
class Rows:
    """Rows of one shard, in order; what could not be read as a row is in `dropped`."""

    keys: list[str]
    captions: list[str] | None
    embeddings_ND: np.ndarray
    dropped: list[tuple[str, str, str]]


@dataclass
class Source:
    """Shards, each a name and what reads it; `dimension` is that of the store."""

    dimension: int
    captions_known: bool
    shards: Iterable[tuple[str, Callable[[], Rows]]]


def import_embeddings(settings: ImportEmbeddingsSettings) -> None:
    """Writes the shards that are missing, then the manifest.

    Raises:
        UserError: a source that is not what its kind says, or more rows than allowed that cannot be used; then there is no
            manifest.
    """
    assert settings.text_encoder is not None
    with ExitStack() as stack:
        stack.enter_context(locked_folder(settings.out))
        source = _official(settings) if settings.kind == "official_parquet" else _array(settings, stack)
        encoder = describe_without_loading(settings.text_encoder)
        writer = StoreWriter(settings.out, encoder, source.dimension, settings.dtype, source.captions_known, _origin(settings))
        ledger, total, names = DropLedger(), 0, []
        for name, read in tqdm(source.shards, desc="import embeddings", unit="shard"):
            names.append(name)
            if not writer.has(name):
                rows = _usable(read(), settings)
                writer.write_shard(name, rows.keys, rows.captions, rows.embeddings_ND, dropped=rows.dropped)
            written = writer.read(name)
            for key, cause, detail in written.statistics.dropped:
                ledger.drop(key, cause, detail)
            total += len(written) + len(written.statistics.dropped)
    ledger.check(total, settings.max_drop_fraction, settings.out / "dropped.jsonl")
    writer.finish(names)
    print(f"{settings.out}: {EmbeddingStore(settings.out).summary()}; {ledger.summary(total)}")


def _origin(settings: ImportEmbeddingsSettings) -> str:
    """Kind, and what changes when a file of the source does, so that an import never goes on with other files."""
    files = [settings.path] if settings.path.is_file() else sorted(settings.path.rglob("*.parquet"))
    files += [settings.key_file] if settings.key_file else []
    states = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return f"{settings.kind} {sha256_text(chr(10).join(states))[:16]}"


def _usable(rows: Rows, settings: ImportEmbeddingsSettings) -> Rows:
    """Leaves out what the store cannot hold and what has the key of an earlier row."""
    fits, finite = storable(rows.embeddings_ND, settings.dtype), storable(rows.embeddings_ND, "int8")
    dropped, kept, seen = list(rows.dropped), [], set[str]()
    for number, key in enumerate(rows.keys):
        if not finite[number]:
            dropped.append((key, "embedding not finite", ""))
        elif not fits[number]:
            dropped.append((key, "embedding beyond the range of float16", "an int8 store holds it"))
        elif key in seen:
            dropped.append((f"{key} (row {number})", "key occurs twice", "the first is kept"))
        else:
            seen.add(key)
            kept.append(number)
    captions = None if rows.captions is None else [rows.captions[number] for number in kept]
    return Rows([rows.keys[number] for number in kept], captions, rows.embeddings_ND[kept], dropped)


def _official(settings: ImportEmbeddingsSettings) -> Source:
    """Shards named, and cut, as those of the data source whose captions they embed, so that keys are found without search."""
    prefix = settings.key_prefix or ""
    root = require_folder(settings.path, "a folder of folders of embedding parquet files (the official LIFT layout)")
    folders = {folder: sorted(folder.glob("*.parquet"), key=_number_then_name) for folder in sorted(root.iterdir())}
    folders = {folder: files for folder, files in folders.items() if files}
    if not folders:
        raise UserError(f"{root}: expected folders of embedding parquet files (FOLDER/0.parquet), found none. Check --path.")
    dimension = _official_dimension(next(iter(folders.values())))

    def shards() -> Iterator[tuple[str, Callable[[], Rows]]]:
        for folder, files in folders.items():
            name = "-".join(filter(None, (prefix.rstrip("/").replace("/", "-"), folder.name)))
            parts = _in_shards(files)
            for number, part in enumerate(parts):
                read = partial(_read_official, part, dimension, f"{prefix}{folder.name}/", settings.key_suffix or "")
                yield name if len(parts) == 1 else f"{name}-{number:05d}", read

    return Source(dimension, False, shards())


def _in_shards(files: list[Path]) -> list[list[Path]]:
    """The files of a folder in groups of at least SHARD_SAMPLES rows."""
    groups: list[list[Path]] = [[]]
    rows = 0
    for file in files:
        if rows >= SHARD_SAMPLES:
            groups.append([])
            rows = 0
        groups[-1].append(file)
        rows += _read_parquet(file, pq.read_metadata).num_rows
    return groups


def _number_then_name(path: Path) -> tuple[int, str]:
    """2.parquet before 10.parquet."""
    return len(path.stem), path.stem


def _official_dimension(files: list[Path]) -> int:
    """The most common length among the embeddings of the first file that has any."""
    for file in files:
        lengths = pc.mode(pc.list_value_length(_read_rows(file)["embedding"]))
        if len(lengths):
            return int(lengths[0]["mode"].as_py())
    raise UserError(f"{files[0].parent}: expected embeddings, found only empty parquet files.")


def _read_parquet(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a whole parquet file: {error}. Fetch it again or remove it.") from error


def _read_rows(file: Path) -> pa.Table:
    """Columns `key` and `embedding`, checked by type."""
    table = _read_parquet(file, pq.read_table)
    types = {field.name: field.type for field in table.schema}
    key, embedding = types.get("key", pa.null()), types.get("embedding", pa.null())
    is_list = pa.types.is_list(embedding) or pa.types.is_large_list(embedding) or pa.types.is_fixed_size_list(embedding)
    if key not in (pa.string(), pa.large_string()) or not is_list or not pa.types.is_floating(embedding.value_type):
        found = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise UserError(f"{file}: expected the columns key (string) and embedding (list of floats), found {found}.")
    return table.select(["key", "embedding"])


def _read_official(files: list[Path], dimension: int, prefix: str, suffix: str) -> Rows:
    keys: list[str] = []
    dropped: list[tuple[str, str, str]] = []
    parts = [np.empty((0, dimension), np.float32)]
    for file in files:
        table = _read_rows(file)
        fits = []
        lengths = pc.list_value_length(table["embedding"]).fill_null(0).to_pylist()
        for number, (name, length) in enumerate(zip(table["key"].to_pylist(), lengths, strict=True)):
            key = f"{prefix}{_without_image_suffix(name)}{suffix}" if name else None
            fits.append(key is not None and length == dimension)
            if key is None:
                dropped.append((f"{prefix}{file.name} row {number}", "no key", ""))
            elif length != dimension:
                dropped.append((key, "embedding of another dimension", f"{file.name}: {length} instead of {dimension}"))
            else:
                keys.append(key)
        values = table["embedding"].filter(pa.array(fits, pa.bool_())).combine_chunks().flatten()
        parts.append(values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, dimension))
    return Rows(keys, None, np.concatenate(parts), dropped)


def _without_image_suffix(key: str) -> str:
    """Keys of the official embedding files are names of image files."""
    return key.rpartition(".")[0] if PurePosixPath(key).suffix[1:].lower() in IMAGE_SUFFIXES else key


def _array(settings: ImportEmbeddingsSettings, stack: ExitStack) -> Source:
    """Shards of an equal number of rows of an array on disk."""
    rows, dimension, read = _open_npy(settings) if settings.kind == "npy" else _open_safetensors(settings, stack)
    starts = _key_offsets(settings, rows)

    def reader(number: int) -> Callable[[], Rows]:
        first = number * ROWS_PER_SHARD

        def read_shard() -> Rows:
            keyed = _read_keys(settings, starts[number], first)
            captions = [caption for _, caption in keyed] if settings.key_format == "jsonl" else None
            return Rows([key for key, _ in keyed], captions, read(first, first + len(keyed)), [])

        return read_shard

    shards = [(f"{settings.path.stem}-{number:05d}", reader(number)) for number in range(len(starts))]
    return Source(dimension, settings.key_format == "jsonl", shards)


def _key_offsets(settings: ImportEmbeddingsSettings, rows: int) -> list[int]:
    """Byte offset in the keys file of every shard's first line. Raises UserError when there is not one line a row."""
    assert settings.key_file is not None
    starts, lines, offset = [], 0, 0
    with require_file(settings.key_file, "the keys of the rows").open("rb") as file:
        for line in file:
            if line.strip():
                if lines % ROWS_PER_SHARD == 0:
                    starts.append(offset)
                lines += 1
            offset += len(line)
    if lines != rows:
        raise UserError(f"{settings.key_file}: expected one key for each of the {rows} rows of {settings.path}, found {lines}.")
    return starts


def _read_keys(settings: ImportEmbeddingsSettings, offset: int, first: int) -> list[tuple[str, str]]:
    """(key, caption) of one shard's rows; the caption is empty where the file holds keys only. `first` is the first row."""
    assert settings.key_file is not None
    keyed: list[tuple[str, str]] = []
    with settings.key_file.open("rb") as file:
        file.seek(offset)
        for line in islice((line for line in file if line.strip()), ROWS_PER_SHARD):
            try:
                text = line.rstrip(b"\r\n").decode("utf-8")
                record = {"key": text, "caption": ""} if settings.key_format == "lines" else json.loads(text)
                key, caption = record["key"], record["caption"]
                if not isinstance(key, str) or not isinstance(caption, str):
                    raise TypeError("key and caption must be strings")
            except (ValueError, KeyError, TypeError) as error:
                expected = "a key" if settings.key_format == "lines" else "an object with the strings key and caption"
                raise UserError(
                    f"{settings.key_file}: expected {expected} for row {first + len(keyed)}, found {line[:80]!r} "
                    f"({type(error).__name__}: {error})."
                ) from error
            keyed.append((f"{settings.key_prefix}{key}{settings.key_suffix}", caption.strip()))
    return keyed


def _open_npy(settings: ImportEmbeddingsSettings) -> tuple[int, int, ReadRows]:
    try:
        array = np.load(require_file(settings.path, "an array of embeddings"), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{settings.path}: expected a .npy array of floats: {error}.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{settings.path}: expected an array of floats [rows, dimension], found {found}.")
    return *array.shape, lambda first, end: array[first:end].astype(np.float32)


def _open_safetensors(settings: ImportEmbeddingsSettings, stack: ExitStack) -> tuple[int, int, ReadRows]:
    try:
        file = stack.enter_context(safe_open(require_file(settings.path, "a tensor of embeddings"), framework="pt"))
    except SafetensorError as error:
        raise UserError(f"{settings.path}: not a safetensors file: {error}.") from error
    names = sorted(file.keys())
    chosen = settings.tensor or (names[0] if len(names) == 1 else None)
    if chosen not in names:
        raise UserError(f"{settings.path}: has the tensors {', '.join(names)}. Name one of them with --tensor.")
    tensor = file.get_slice(chosen)
    shape = tensor.get_shape()
    if len(shape) != 2 or not tensor[:0].is_floating_point():
        found = f"{tensor.get_dtype()} {shape}"
        raise UserError(f"{settings.path}: expected '{chosen}' to hold floats [rows, dimension], found {found}.")
    return *shape, lambda first, end: tensor[first:end].float().numpy()
