"""The embedding store: one Arrow IPC (Feather v2) file per caption shard and one `manifest.json`.

Captions and their embeddings come in shard by shard; out comes memory-mapped random access to float16 rows by caption key.
A shard file exists only when complete, so a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from lift.common.errors import UserError
from lift.common.files import atomic_file, read_json, sha256_file, sha256_text, write_json

FORMAT = 1


def caption_hash(caption: str) -> int:
    """First eight bytes of the caption's sha256, as an unsigned integer."""
    return int(sha256_text(caption)[:16], 16)


def stored_captions(path: Path) -> dict[str, int]:
    """Caption key -> caption hash of the rows of a shard file.

    Raises:
        UserError: not a whole Arrow file.
    """
    try:
        with pa.memory_map(path.as_posix()) as source:
            table = pa.ipc.open_file(source).read_all()
            return dict(zip(table["key"].to_pylist(), table["caption_hash"].to_pylist(), strict=True))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a whole shard of an embedding store: {error}. Delete it and embed again.") from error


class StoreWriter:
    """Writes the shards of one store; `encoder` (what made the embeddings) goes into the manifest.

    Raises:
        UserError: the folder holds a store made by another encoder.
    """

    def __init__(self, folder: Path, encoder: dict[str, Any], dimension: int) -> None:
        self.folder = folder
        self.header = {"format": FORMAT, "encoder": encoder, "dimension": dimension, "dtype": "float16"}
        started = folder / "encoder.json"
        if any(folder.glob("*.arrow")) and read_json(started, "the description of a started store") != self.header:
            raise UserError(
                f"{folder}: holds embeddings of another text encoder ({started}). Choose another folder, or delete it."
            )
        write_json(started, self.header)

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}.arrow"

    def has(self, shard: str) -> bool:
        return self.path(shard).is_file()

    def keys(self, shard: str) -> list[str]:
        with pa.memory_map(self.path(shard).as_posix()) as source:
            return pa.ipc.open_file(source).read_all()["key"].to_pylist()

    def write_shard(self, shard: str, keys: list[str], captions: list[str], embeddings: np.ndarray) -> None:
        """`embeddings` is [rows, dimension] of any float type, stored as float16 in the order given."""
        flat = pa.array(embeddings.astype(np.float16).reshape(-1))
        table = pa.table(
            {
                "key": pa.array(keys, pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, self.header["dimension"]),
                "caption_hash": pa.array([caption_hash(caption) for caption in captions], pa.uint64()),
            }
        )
        with atomic_file(self.path(shard)) as temporary, pa.ipc.new_file(temporary.as_posix(), table.schema) as writer:
            writer.write_table(table.combine_chunks())

    def finish(self, shards: list[str]) -> None:
        """Writes the manifest, which makes the store usable."""
        entries = []
        for shard in shards:
            with pa.memory_map(self.path(shard).as_posix()) as source:
                rows = pa.ipc.open_file(source).read_all().num_rows
            entries.append({"name": shard, "rows": rows, "sha256": sha256_file(self.path(shard))})
        write_json(self.folder / "manifest.json", {**self.header, "rows": sum(e["rows"] for e in entries), "shards": entries})


class EmbeddingStore:
    """Random access to a finished store.

    Raises:
        UserError: no manifest (the store is not finished), or a shard that does not have the rows the manifest states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_json(folder / "manifest.json", "the manifest of a finished embedding store (run lift embed)")
        self._row: dict[str, int] = {}
        hashes, blocks = [], []
        for entry in self.manifest["shards"]:
            path = folder / f"{entry['name']}.arrow"
            if not path.is_file():
                raise UserError(f"{path}: the manifest names this shard, but it is missing. Run lift embed again.")
            table = pa.ipc.open_file(pa.memory_map(path.as_posix())).read_all()
            if table.num_rows != entry["rows"]:
                raise UserError(
                    f"{path}: expected {entry['rows']} rows, found {table.num_rows}. Delete the store and embed again."
                )
            for key in table["key"].to_pylist():
                if key in self._row:
                    raise UserError(f"{path}: the key '{key}' occurs twice in the store. Delete the store and embed again.")
                self._row[key] = len(self._row)
            hashes.append(table["caption_hash"].to_numpy())
            for chunk in table["embedding"].chunks:
                blocks.append(chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.dimension))
        self._hashes = np.concatenate(hashes)
        self._blocks = blocks
        self._starts = np.cumsum([0] + [len(block) for block in blocks])

    @property
    def dimension(self) -> int:
        return int(self.manifest["dimension"])

    def __len__(self) -> int:
        return len(self._row)

    def find(self, key: str, caption: str) -> int | None:
        """Row of the caption, or None when the key is not there or was embedded with another text."""
        row = self._row.get(key)
        return row if row is not None and int(self._hashes[row]) == caption_hash(caption) else None

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """float32 [len(indices), dimension]."""
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack([self._blocks[b][i - self._starts[b]] for b, i in zip(blocks, indices, strict=True)]).astype(np.float32)

    def sample(self, limit: int, seed: int) -> np.ndarray:
        """At most `limit` rows drawn without replacement, float32; the same for the same seed."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:limit]
        return self.rows(np.sort(chosen))
