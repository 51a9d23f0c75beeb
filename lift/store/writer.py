"""Writing an embedding store: shards in any order, by any number of processes, then the manifest that makes it usable.

A shard file exists only when complete, so a run that was interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lift.common.errors import UserError
from lift.common.files import read_json, sha256_file, write_json
from lift.store.shard_file import Drop, ShardFile, StoreDtype, read_shard_file, write_shard_file

FORMAT = 2


class StoreWriter:
    """Writes the shards of one store; `encoder` (what made the embeddings) goes into the manifest.

    `captions_known` is False for embeddings made elsewhere that came without their texts: rows are then matched by key alone.
    `imported_from` is the form in which such embeddings came; the shards of an imported store are not those of a data source.

    Raises:
        UserError: the folder holds a store made by another encoder, or of another dimension or dtype.
    """

    def __init__(
        self,
        folder: Path,
        encoder: dict[str, Any],
        dimension: int,
        dtype: StoreDtype = "float16",
        captions_known: bool = True,
        imported_from: str | None = None,
    ) -> None:
        self.folder, self.dimension, self.dtype, self.captions_known = folder, dimension, dtype, captions_known
        self.header = {
            "format": FORMAT,
            "encoder": encoder,
            "dimension": dimension,
            "dtype": dtype,
            "captions": "known" if captions_known else "unknown",
            "imported_from": imported_from,
        }
        started = folder / "encoder.json"
        if any(folder.glob("*.arrow")):
            before = read_json(started, "the description of a started store")
            if different := [name for name in self.header if before.get(name) != self.header[name]]:
                raise UserError(
                    f"{folder}: holds embeddings with {different[0]} {before.get(different[0])} ({started}), this run makes "
                    f"{self.header[different[0]]}. Choose another folder, or delete it."
                )
        write_json(started, self.header)

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}.arrow"

    def has(self, shard: str) -> bool:
        return self.path(shard).is_file()

    def read(self, shard: str) -> ShardFile:
        """The columns of a finished shard, memory-mapped."""
        return read_shard_file(self.path(shard), self.dimension, self.dtype)

    def write_shard(
        self,
        shard: str,
        keys: Sequence[str],
        captions: Sequence[str] | None,
        embeddings_ND: np.ndarray,
        truncated: int = 0,
        dropped: Sequence[Drop] = (),
    ) -> None:
        """Stores rows in the order given. `embeddings_ND` is of any float type; rows must be `storable`.

        `truncated` counts captions longer than max_length; `dropped` names samples without a row, for who continues the run.

        Raises:
            UserError: a row that the store cannot hold.
        """
        if embeddings_ND.shape != (len(keys), self.dimension) or (captions is not None) != self.captions_known:
            raise ValueError(f"{shard}: {len(keys)} keys and embeddings of shape {embeddings_ND.shape} do not fit the store")
        write_shard_file(self.path(shard), self.dtype, keys, captions, embeddings_ND, truncated, dropped)

    def finish(self, shards: list[str]) -> None:
        """Writes the manifest, which makes the store usable.

        Raises:
            UserError: a shard is damaged, or a key occurs twice.
        """
        entries, key_hashes = [], [np.empty(0, np.uint64)]
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(sha256_file, map(self.path, shards))
            for shard, sha256 in zip(shards, hashes, strict=True):
                file = self.read(shard)
                key_hashes.append(file.key_hashes.copy())  # a view would keep every shard mapped
                entries.append(_entry(shard, file, self.path(shard).stat().st_size, sha256))
        self._refuse_duplicate_keys(shards, np.concatenate(key_hashes))
        write_json(self.folder / "manifest.json", {**self.header, **_totals(entries), "transforms": {}, "shards": entries})

    def _refuse_duplicate_keys(self, shards: list[str], key_hashes: np.ndarray) -> None:
        key_hashes.sort()
        repeated = np.unique(key_hashes[1:][key_hashes[1:] == key_hashes[:-1]])
        if not len(repeated):
            return
        # a hash that repeats may still belong to two keys: one in 40 stores of a billion rows has such a pair
        places: dict[str, list[str]] = {}
        for shard in shards:
            file = self.read(shard)
            for key in file.keys.filter(pa.array(np.isin(file.key_hashes, repeated))).to_pylist():
                places.setdefault(key, []).append(self.path(shard).name)
        key, files = max(places.items(), key=lambda item: len(item[1]))
        if len(files) > 1:
            raise UserError(
                f"{self.folder}: the key '{key}' occurs {len(files)} times, in {files[0]} and {files[1]}. Give every caption "
                "its own key, delete these files, and embed again."
            )


def _entry(shard: str, file: ShardFile, size: int, sha256: str) -> dict[str, Any]:
    statistics = file.statistics
    return {
        "name": shard,
        "rows": len(file),
        "bytes": size,
        "sha256": sha256,
        "mean_cosine_error": statistics.mean_cosine_error,
        "max_cosine_error": statistics.max_cosine_error,
        "truncated": statistics.truncated,
    }


def _totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over shards; means weighted by their rows."""
    rows = sum(entry["rows"] for entry in entries)
    error = sum(entry["mean_cosine_error"] * entry["rows"] for entry in entries)
    return {
        "rows": rows,
        "bytes_per_caption": round(sum(entry["bytes"] for entry in entries) / max(1, rows), 3),
        "mean_cosine_error": error / max(1, rows),
        "max_cosine_error": max((entry["max_cosine_error"] for entry in entries), default=0.0),
        "truncated": sum(entry["truncated"] for entry in entries),
    }
