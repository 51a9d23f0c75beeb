"""One shard of an embedding store: an uncompressed Arrow IPC (Feather v2) file of one record batch.

Keys and float rows come in; out comes a file that other tools read, or, of a file, its columns as memory-maps. The schema's
metadata states what the shard costs and loses: bytes per caption, cosine error, captions cut at max_length, samples dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from lift.common.errors import UserError
from lift.common.files import atomic_file, sha256_text
from lift.quantise import CHUNK, QuantisedRows, blocks, dequantise, quantise

StoreDtype = Literal["float16", "int8", "float32"]
"""float32 is for files that are needed only while a store is made."""
FLOATS: dict[StoreDtype, tuple[type[np.floating], pa.DataType]] = {
    "float16": (np.float16, pa.float16()),
    "float32": (np.float32, pa.float32()),
}
Drop = tuple[str, str, str]
"""(key, cause, detail), as the drop ledger has it."""


def text_hash(text: str) -> int:
    """First eight bytes of the text's sha256, as an unsigned integer."""
    return int(sha256_text(text)[:16], 16)


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """uint64 [len(texts)]."""
    return np.fromiter(map(text_hash, texts), np.uint64, len(texts))


def storable(embeddings_ND: np.ndarray, dtype: StoreDtype) -> np.ndarray:
    """bool [N]: rows that the store can hold: finite and, in a float16 store, not beyond float16's 65504."""
    with np.errstate(over="ignore"):
        stored = embeddings_ND.astype(np.float16 if dtype == "float16" else np.float32)
    return np.isfinite(stored).all(axis=1)


@dataclass(frozen=True)
class ShardStatistics:
    """What a shard costs and loses."""

    bytes_per_caption: float
    """File size over rows; keys, hashes and headers included."""
    mean_cosine_error: float
    """Mean of 1 - cosine between the stored row and the float32 row that came in."""
    max_cosine_error: float
    truncated: int
    """Captions longer than the text encoder's max_length."""
    dropped: list[Drop]
    """Samples of the shard that have no row."""

    def metadata(self) -> dict[str, str]:
        # of fixed width, because the file's size, which it states, must not depend on it
        return {
            "bytes_per_caption": f"{self.bytes_per_caption:016.3f}",
            "mean_cosine_error": f"{self.mean_cosine_error:.6e}",
            "max_cosine_error": f"{self.max_cosine_error:.6e}",
            "truncated": str(self.truncated),
            "dropped": json.dumps(self.dropped, ensure_ascii=False),
        }

    @classmethod
    def of(cls, metadata: dict[bytes, bytes]) -> ShardStatistics:
        numbers = {name: float(metadata[name.encode()]) for name in ("mean_cosine_error", "max_cosine_error")}
        dropped = [(key, cause, detail) for key, cause, detail in json.loads(metadata[b"dropped"])]
        return cls(float(metadata[b"bytes_per_caption"]), truncated=int(metadata[b"truncated"]), dropped=dropped, **numbers)


@dataclass(frozen=True)
class ShardFile:
    """Memory-mapped columns of a shard; they stay valid as long as one of them is referenced."""

    keys: pa.Array
    key_hashes: np.ndarray
    """uint64 [rows]."""
    caption_hashes: np.ndarray
    """uint64 [rows]; 0 in a store whose captions are unknown."""
    embedding_ND: np.ndarray
    """Floats, or int8 codes."""
    row_scale_N: np.ndarray | None
    block_scale_NK: np.ndarray | None
    statistics: ShardStatistics

    def __len__(self) -> int:
        return len(self.keys)


def schema(dimension: int, dtype: StoreDtype) -> pa.Schema:
    fields = [("key", pa.string()), ("key_hash", pa.uint64()), ("caption_hash", pa.uint64())]
    if dtype in FLOATS:
        return pa.schema([*fields, ("embedding", pa.list_(FLOATS[dtype][1], dimension))])
    scales = [("row_scale", pa.float32()), ("block_scale", pa.list_(pa.uint8(), blocks(dimension)))]
    return pa.schema([*fields, ("embedding", pa.list_(pa.int8(), dimension)), *scales])


def write_shard_file(
    path: Path,
    dtype: StoreDtype,
    keys: Sequence[str],
    captions: Sequence[str] | None,
    embeddings_ND: np.ndarray,
    truncated: int = 0,
    dropped: Sequence[Drop] = (),
) -> None:
    """Atomic. `embeddings_ND` is of any float type; `captions` is None when they are unknown.

    Raises:
        UserError: a row that the store cannot hold, see `storable`.
    """
    dimension = embeddings_ND.shape[1]
    if (bad := ~storable(embeddings_ND, dtype)).any():
        raise UserError(
            f"{path}: the embedding of '{keys[int(bad.argmax())]}' is not finite as {dtype}. Leave such rows out, or, if they "
            "are only too large, make an int8 store."
        )
    columns: list[Any] = [pa.array(keys, pa.string()), pa.array(text_hashes(keys))]
    columns.append(pa.array(text_hashes(captions) if captions is not None else np.zeros(len(keys), np.uint64)))
    if dtype in FLOATS:
        stored_ND = embeddings_ND.astype(FLOATS[dtype][0])
        columns.append(_list_array(stored_ND))
        errors = _cosine_errors(embeddings_ND, lambda part: stored_ND[part])
    else:
        quantised = quantise(embeddings_ND)
        columns += [_list_array(quantised.codes_ND), pa.array(quantised.row_scale_N), _list_array(quantised.block_scale_NK)]
        errors = _cosine_errors(embeddings_ND, lambda part: dequantise(QuantisedRows(*(column[part] for column in quantised))))
    mean, largest = (float(errors.mean()), float(errors.max())) if len(errors) else (0.0, 0.0)
    statistics = ShardStatistics(0.0, mean, largest, truncated, list(dropped))
    counter = pa.MockOutputStream()
    _write(counter, columns, dimension, dtype, statistics)
    statistics = replace(statistics, bytes_per_caption=counter.size() / max(1, len(keys)))
    with atomic_file(path) as temporary:
        _write(temporary.as_posix(), columns, dimension, dtype, statistics)


def read_shard_file(path: Path, dimension: int, dtype: StoreDtype) -> ShardFile:
    """Raises UserError when `path` is not a whole shard with this dimension and dtype."""
    try:
        with pa.memory_map(path.as_posix()) as source:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise UserError(f"{path}: expected a whole shard of an embedding store: {error}. Delete it and embed again.") from error
    expected = schema(dimension, dtype)
    if not file.schema.equals(expected) or len(batches) != 1:
        raise UserError(
            f"{path}: expected one record batch of {_one_line(expected)}, found {len(batches)} of {_one_line(file.schema)}. "
            "Delete the store and embed again."
        )
    batch = batches[0]
    return ShardFile(
        keys=batch["key"],
        key_hashes=batch["key_hash"].to_numpy(),
        caption_hashes=batch["caption_hash"].to_numpy(),
        embedding_ND=_matrix(batch["embedding"]),
        row_scale_N=batch["row_scale"].to_numpy() if dtype == "int8" else None,
        block_scale_NK=_matrix(batch["block_scale"]) if dtype == "int8" else None,
        statistics=ShardStatistics.of(file.schema.metadata),
    )


def _write(sink: Any, columns: list[Any], dimension: int, dtype: StoreDtype, statistics: ShardStatistics) -> None:
    described = schema(dimension, dtype).with_metadata(statistics.metadata())
    with pa.ipc.new_file(sink, described) as writer:
        writer.write_batch(pa.record_batch(columns, schema=described))


def _cosine_errors(embeddings_ND: np.ndarray, stored: Callable[[slice], np.ndarray]) -> np.ndarray:
    """float64 [N]: 1 - cosine of each row before and after; 0 where the row itself is zero."""
    errors = np.empty(len(embeddings_ND))
    for start in range(0, len(errors), CHUNK):
        part = slice(start, start + CHUNK)
        before_ND = embeddings_ND[part].astype(np.float32).astype(np.float64)
        after_ND = stored(part).astype(np.float64)
        lengths = np.linalg.norm(before_ND, axis=1) * np.linalg.norm(after_ND, axis=1)
        cosine = np.divide(np.einsum("nd,nd->n", before_ND, after_ND), lengths, out=np.zeros(len(lengths)), where=lengths > 0)
        errors[part] = np.where(before_ND.any(axis=1), np.maximum(0, 1 - cosine), 0)
    return errors


def _list_array(values_NK: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NK.reshape(-1)), values_NK.shape[1])


def _matrix(lists: pa.Array) -> np.ndarray:
    return lists.flatten().to_numpy(zero_copy_only=True).reshape(len(lists), lists.type.list_size)


def _one_line(found: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in found)
