"""Packs: the indexes of many files copied into few, when there are more of them than a process should keep open.

A data set may lie in a hundred thousand tars; Linux lets a process map 65,530 files, and to open one for each sample would cost
more than to decode its image. A pack is named by what is in it, and made once.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from lift.common.files import sha256_text, working_file
from lift.sources.samples import open_index

MOST_ALONE = 1024
"""Indexes that are used as they are; of more, packs are made."""
INDEXES_IN_A_PACK = 64


def packed(indexes: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """For each (index file, rows): the file to read its rows in, and the first of them there."""
    if len(indexes) <= MOST_ALONE:
        return [(index, 0) for index, _ in indexes]
    places = []
    for start in range(0, len(indexes), INDEXES_IN_A_PACK):
        group = indexes[start : start + INDEXES_IN_A_PACK]
        pack = _pack([index for index, _ in group])
        first = 0
        for _, rows in group:
            places.append((pack, first))
            first += rows
    return places


def _pack(indexes: list[Path]) -> Path:
    pack = indexes[0].parent / f"pack-{sha256_text(' '.join(index.name for index in indexes))[:16]}.arrow"
    if not pack.is_file():
        with working_file(pack) as temporary:
            with pa.ipc.new_file(temporary.as_posix(), open_index(indexes[0]).schema) as file:
                for index in indexes:
                    file.write_table(open_index(index))
            temporary.replace(pack)
    return pack
