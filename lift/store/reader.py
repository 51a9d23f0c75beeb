"""Reading a finished embedding store: rows in any order, and the row of a caption.

Row numbers count through the shards in the manifest's order. Shards are opened, and their pages read, only when touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lift.common.errors import UserError
from lift.common.files import read_json, sha256_text, write_json
from lift.quantise import LARGEST, QuantisedRows, blocks, dequantise
from lift.store.key_index import candidates, open_key_index
from lift.store.shard_file import ShardFile, StoreDtype, read_shard_file, text_hashes
from lift.store.writer import FORMAT

OPEN_SHARDS = 12_288
"""Shards kept open: Linux allows a process 65,530 memory-maps, and a run has up to three stores and its sources' indexes."""


class EmbeddingStore:
    """Random access to a finished store.

    Raises:
        UserError: no manifest (the store is not finished), one of another format, or a shard that is missing or does not have
            the size the manifest states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_json(
            folder / "manifest.json", "the manifest of a finished embedding store (run lift embed)"
        )
        if self.manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder}: expected an embedding store of format {FORMAT}, found {self.manifest.get('format')}. Delete it and "
                "embed again."
            )
        self.dimension = int(self.manifest["dimension"])
        self.dtype: StoreDtype = self.manifest["dtype"]
        self._number = {entry["name"]: number for number, entry in enumerate(self.manifest["shards"])}
        for name, number in self._number.items():
            path, size = self._path(name), self.manifest["shards"][number]["bytes"]
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise UserError(
                    f"{path}: the manifest states {size} bytes, found {'no such file' if found is None else found}. Delete "
                    "manifest.json and this file, and embed again."
                )
        self._starts = np.cumsum([0] + [entry["rows"] for entry in self.manifest["shards"]])
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Path]]:
        return EmbeddingStore, (self.folder,)  # another process maps the files anew

    def __len__(self) -> int:
        return int(self._starts[-1])

    def summary(self) -> str:
        """One line: rows, bytes per caption, cosine error, captions cut."""
        manifest = self.manifest
        return (
            f"{len(self)} embeddings, {self.dtype}, {manifest['bytes_per_caption']:.0f} bytes per caption, cosine error mean "
            f"{manifest['mean_cosine_error']:.1e} max {manifest['max_cosine_error']:.1e}, {manifest['truncated']} captions cut"
        )

    def rows(self, indices: np.ndarray, dtype: type[np.floating] | None = None) -> np.ndarray:
        """[len(indices), dimension] of `dtype`, in the order given.

        Without `dtype` what costs nothing: float16 of a float16 store, float32 of an int8 store.

        Raises:
            UserError: float16 is asked of an int8 store, and a row goes beyond float16's range.
        """
        indices = np.asarray(indices, np.int64)
        if self.dtype == "float16":
            values = self._gather("embedding_ND", indices, (self.dimension,), np.float16)
            return values if dtype is None else values.astype(dtype, copy=False)
        codes_ND = self._gather("embedding_ND", indices, (self.dimension,), np.int8)
        row_scale_N = self._gather("row_scale_N", indices, (), np.float32)
        block_scale_NK = self._gather("block_scale_NK", indices, (blocks(self.dimension),), np.uint8)
        if dtype is np.float16 and (row_scale_N > np.finfo(np.float16).max / LARGEST).any():
            raise UserError(f"{self.folder}: a row of this int8 store goes beyond float16's range. Read it as float32.")
        return dequantise(QuantisedRows(codes_ND, row_scale_N, block_scale_NK), dtype or np.float32)

    def sample(self, limit: int, seed: int) -> np.ndarray:
        """At most `limit` rows drawn without replacement, in the store's order, as `rows` gives them."""
        if limit >= len(self):
            return self.rows(np.arange(len(self)))
        return self.rows(np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False, shuffle=False)))

    def match(self, shard: str, keys: Sequence[str] | pa.Array, caption_hashes: np.ndarray | None = None) -> np.ndarray:
        """int64 [len(keys)]: the row of each key, or -1 where the key is not there or was embedded with another text.

        Args:
            shard: where the keys are expected, which costs least; keys that are not there are looked up in the whole store.
            caption_hashes: uint64, see `text_hashes`; without them, or where the store has none, keys alone count.
        """
        wanted = keys.cast(pa.string()) if isinstance(keys, pa.Array) else pa.array(keys, pa.string())
        rows = np.full(len(wanted), -1, np.int64)
        if shard in self._number:
            stored = self._shard(self._number[shard]).keys
            if stored.equals(wanted):
                local = np.arange(len(wanted))
            else:
                local = pc.index_in(wanted, value_set=stored).fill_null(-1).to_numpy()
            rows = np.where(local >= 0, self._starts[self._number[shard]] + local, -1)
        left = np.flatnonzero(rows < 0)
        if len(left):
            rows[left] = self._find(wanted.take(pa.array(left)))
        if caption_hashes is not None and self.manifest["captions"] == "known":
            found = np.flatnonzero(rows >= 0)
            same = self._gather("caption_hashes", rows[found], (), np.uint64) == np.asarray(caption_hashes, np.uint64)[found]
            rows[found[~same]] = -1
        return rows

    def record_transform(self, name: str, entry: dict[str, Any]) -> None:
        """Notes a fitted text-side transform in the manifest."""
        self.manifest = read_json(self.folder / "manifest.json")
        self.manifest["transforms"] = {**self.manifest["transforms"], name: entry}
        write_json(self.folder / "manifest.json", self.manifest)

    @cached_property
    def _key_index(self) -> np.ndarray:
        fingerprint = sha256_text(json.dumps(self.manifest["shards"]))
        parts = (self._shard(number).key_hashes for number in range(len(self._number)))
        return open_key_index(self.folder, fingerprint, parts, len(self))

    def _find(self, keys: pa.Array) -> np.ndarray:
        """Rows of keys anywhere in the store, -1 where there is none. Hashes find a candidate, the key itself decides."""
        hashes = text_hashes(keys.to_pylist())
        rows, open_ = np.full(len(keys), -1, np.int64), np.arange(len(keys))
        attempt = 0
        while len(open_):
            candidate = candidates(self._key_index, hashes[open_], attempt)
            open_, candidate = open_[candidate >= 0], candidate[candidate >= 0]
            same = np.zeros(len(open_), bool)
            for number, at, local in self._by_shard(candidate):
                stored = self._shard(number).keys.take(pa.array(local))
                same[at] = pc.equal(stored, keys.take(pa.array(open_[at]))).to_numpy(zero_copy_only=False)
            rows[open_[same]] = candidate[same]
            open_, attempt = open_[~same], attempt + 1
        return rows

    def _gather(self, column: str, indices: np.ndarray, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        out = np.empty((len(indices), *shape), dtype)
        for number, at, local in self._by_shard(indices):
            out[at] = getattr(self._shard(number), column)[local]
        return out

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places in `indices`, rows in that shard), every shard once and its rows in rising order."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self.folder}: rows {indices.min()} to {indices.max()} of {len(self)}")
        order = np.argsort(indices, kind="stable")
        numbers = np.searchsorted(self._starts, indices[order], side="right") - 1
        ends = [*np.flatnonzero(np.diff(numbers)) + 1, len(indices)] if len(indices) else []
        start = 0
        for end in ends:
            number, at = int(numbers[start]), order[start:end]
            yield number, at, indices[at] - self._starts[number]
            start = end

    def _open(self, number: int) -> ShardFile:
        entry = self.manifest["shards"][number]
        file = read_shard_file(self._path(entry["name"]), self.dimension, self.dtype)
        if len(file) != entry["rows"]:
            path = self._path(entry["name"])
            raise UserError(f"{path}: expected {entry['rows']} rows, found {len(file)}. Delete the store and embed again.")
        return file

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard}.arrow"
