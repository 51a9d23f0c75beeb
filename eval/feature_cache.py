"""Features on disk, by what they are of: an interrupted evaluation goes on, and a second task or encoder reuses what is there.

A cache is a folder of safetensors files, each written whole under a name of its own, so that several processes may share it and
a killed one leaves nothing half. A damaged file counts as absent; its features are made again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lift.common.errors import UserError
from lift.common.files import atomic_file, sha256_bytes

KEY_BYTES = 16
"""Of the sha256 that names a feature."""


def cache_folder() -> Path:
    """In the folder of the environment variable LIFT_CACHE, else in the user's cache."""
    cache = Path(os.environ.get("LIFT_CACHE") or Path.home() / ".cache" / "lift")
    if cache.is_file():
        raise UserError(f"LIFT_CACHE: expected a folder, found the file {cache}.")
    return cache / "features"


class FeatureCache:
    """Rows of float32 [T], each under the hash of what it is of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place: dict[bytes, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="np") as file:
                    keys_NK = file.get_tensor("keys")
            except (SafetensorError, OSError):
                continue
            self._remember(path, keys_NK)

    def __contains__(self, key: str) -> bool:
        return _short(key) in self._place

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """float32 [N, T], a row for each key. Raises KeyError for one that is not there."""
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for number, key in enumerate(keys):
            path, row = self._place[_short(key)]
            wanted.setdefault(path, []).append((number, row))
        out_NT: np.ndarray | None = None
        for path, places in wanted.items():
            with safe_open(path, framework="np") as file:
                features_MT = file.get_tensor("features")
            if out_NT is None:
                out_NT = np.empty((len(keys), features_MT.shape[1]), np.float32)
            numbers, rows = np.array(places).T
            out_NT[numbers] = features_MT[rows]
        return np.empty((0, 0), np.float32) if out_NT is None else out_NT

    def write(self, keys: Sequence[str], features_NT: np.ndarray) -> None:
        """Adds rows; on disk when this returns."""
        keys_NK = np.frombuffer(b"".join(map(_short, keys)), np.uint8).reshape(len(keys), KEY_BYTES)
        path = self.folder / f"{sha256_bytes(keys_NK.tobytes())[:16]}.safetensors"
        with atomic_file(path) as temporary:
            save_file({"keys": keys_NK, "features": np.ascontiguousarray(features_NT, dtype=np.float32)}, temporary)
        self._remember(path, keys_NK)

    def _remember(self, path: Path, keys_NK: np.ndarray) -> None:
        for row, key in enumerate(keys_NK):
            self._place[key.tobytes()] = (path, row)


def _short(key: str) -> bytes:
    return bytes.fromhex(key)[:KEY_BYTES]
