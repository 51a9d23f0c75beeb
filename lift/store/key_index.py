"""Finding keys in a whole store: all 64-bit key hashes, sorted, with their rows, in one memory-mapped file.

Built from the store's shards when first needed, kept in the store under a name that changes with its content.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lift.common.files import atomic_file


def open_key_index(folder: Path, fingerprint: str, key_hashes: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """uint64 [2, rows], memory-mapped: the key hashes of all shards in rising order, and the global row of each.

    Takes 16 bytes per row on disk, and as much in memory while it is built. `fingerprint` stands for the store's content.
    """
    path = folder / f"key_index-{fingerprint[:16]}.npy"
    if not path.is_file():
        hashes = np.empty(rows, np.uint64)
        start = 0
        for part in key_hashes:
            hashes[start : start + len(part)] = part
            start += len(part)
        order = np.argsort(hashes, kind="stable")
        with atomic_file(path) as temporary:
            index = np.lib.format.open_memmap(temporary, "w+", np.uint64, (2, rows))
            np.take(hashes, order, out=index[0])
            index[1] = order
            index.flush()
            del index
        for old in folder.glob("key_index-*.npy"):
            if old != path:
                old.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def candidates(index: np.ndarray, hashes: np.ndarray, attempt: int) -> np.ndarray:
    """int64 [len(hashes)]: the row of the `attempt`-th (from 0) key with each hash, -1 where there are not that many."""
    places = np.searchsorted(index[0], hashes) + attempt
    inside = places < index.shape[1]
    places[~inside] = 0
    hit = inside & (index[0][places] == hashes) if index.shape[1] else inside
    return np.where(hit, index[1][places].astype(np.int64) if index.shape[1] else -1, -1)
