"""Captions that more than one shard holds: embedded once, before the shards, which then look them up.

Of all shards only the captions' hashes are held, 16 bytes a caption for a while, and the text of those that repeat. These are
cut into units of work, in the order of their hashes; any engine embeds them as it does shards, to float32 files in a folder of
the unfinished store.
A unit depends on nothing but the captions, so the bytes of the store do not depend on engine, workers or interruptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from lift.common.files import sha256_text
from lift.store.shard_file import StoreDtype, read_shard_file, text_hashes

FOLDER = "repeated"
"""In the folder of a store until that is finished."""
DTYPE: StoreDtype = "float32"
UNIT_CAPTIONS = 10_000


class HashedCaptions(Protocol):
    def keyed_captions(self) -> list[tuple[str, str]]: ...

    def caption_hashes(self) -> np.ndarray: ...


@dataclass(frozen=True)
class RepeatedCaptions:
    """A unit of work, as a shard whose captions are their own keys. The name begins with the smallest hash."""

    name: str
    captions: tuple[str, ...]

    def keyed_captions(self) -> list[tuple[str, str]]:
        return [(caption, caption) for caption in self.captions]

    def caption_hashes(self) -> np.ndarray:
        return text_hashes(self.captions)

    def sample_of(self, caption_key: str) -> str:
        return caption_key


def repeated_captions(shards: Sequence[HashedCaptions]) -> list[RepeatedCaptions]:
    """Every caption that two or more of `shards` hold, once, by ascending hash."""
    progress = tqdm(shards, desc="look for repeated captions", unit="shard")
    hashes = np.concatenate([np.empty(0, np.uint64), *(np.unique(shard.caption_hashes()) for shard in progress)])
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    texts: dict[int, str] = {}
    for shard in shards if len(repeated) else ():
        of_shard = shard.caption_hashes()
        place = np.searchsorted(repeated, of_shard).clip(max=len(repeated) - 1)
        rows = np.flatnonzero(repeated[place] == of_shard)
        captions = shard.keyed_captions() if len(rows) else []
        for row in rows:
            # another text of the same hash, one in a billion captions, is left to its shards
            texts.setdefault(int(of_shard[row]), captions[row][1])
    ordered = sorted(texts)
    units = []
    for start in range(0, len(ordered), UNIT_CAPTIONS):
        unit = tuple(texts[number] for number in ordered[start : start + UNIT_CAPTIONS])
        units.append(RepeatedCaptions(f"{ordered[start]:016x}-{sha256_text(str(unit))[:12]}", unit))
    return units


def look_up(folder: Path, dimension: int, captions: list[str]) -> dict[str, np.ndarray]:
    """float32 [dimension] of each of `captions` that was embedded in advance, by the units whose files lie in `folder`."""
    files = sorted(folder.glob("*.arrow"))
    if not files:
        return {}
    distinct = np.array(sorted(set(captions)), object)
    hashes = text_hashes(distinct.tolist())
    unit_of = np.searchsorted(np.array([int(file.name[:16], 16) for file in files], np.uint64), hashes, side="right") - 1
    found: dict[str, np.ndarray] = {}
    for number in np.unique(unit_of[unit_of >= 0]):
        unit = read_shard_file(files[number], dimension, DTYPE)
        of_unit = unit_of == number
        rows = np.searchsorted(unit.key_hashes, hashes[of_unit])
        for caption, row in zip(distinct[of_unit], rows, strict=True):
            if row < len(unit) and unit.keys[int(row)].as_py() == caption:
                found[caption] = unit.embedding_ND[row]
    return found
