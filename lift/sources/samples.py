"""Samples of image-caption sources: key, captions, where the image lies; by shard (a unit of embedding) or all together.

They are read from memory-mapped index files (`lift.sources.index`), so that any of a billion can be had in any order and
nothing but the rows looked at is in memory. Objects here are small and can be sent to other processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from lift.sources.storage import read_ranges


class Image(Protocol):
    def read(self) -> bytes:
        """The encoded image. Raises OSError when it cannot be read."""
        ...


@dataclass(frozen=True)
class ImageLocation:
    """`size` bytes at `offset` of the file or URL `path`; a size of -1 means the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        return read_ranges([(self.path, self.offset, self.size)])[0]


@dataclass(frozen=True)
class TableImage:
    """The image of one row of a Hugging Face `datasets` table."""

    path: str
    split: str
    column: str
    row: int

    def read(self) -> bytes:
        from lift.sources.tables import read_image  # datasets is an extra

        return read_image(self)


def read_images(images: Sequence[Image]) -> list[bytes | OSError]:
    """Content of each image, or the error that reading it gave; files are read together, which hides remote latency."""
    located = [image for image in images if isinstance(image, ImageLocation)]
    try:
        together = iter(read_ranges([(image.path, image.offset, image.size) for image in located]))
    except OSError:  # one of them: find out which
        return [_read_or_error(image) for image in images]
    return [next(together) if isinstance(image, ImageLocation) else _read_or_error(image) for image in images]


def _read_or_error(image: Image) -> bytes | OSError:
    try:
        return image.read()
    except OSError as error:
        return error


@dataclass(frozen=True)
class Sample:
    """`captions` maps a caption key (`KEY#POSITION`, the key of the embedding store) to its text."""

    key: str
    captions: dict[str, str]
    image: Image


@dataclass(frozen=True)
class Shard(Sequence[Sample]):
    """Rows `start` to `stop` of an index file: the samples of one tar, or of a part of one JSON file or table."""

    name: str
    index_file: Path
    start: int
    stop: int
    content: str
    """Hash of the keys and captions of the whole file or table that the shard is a part of."""
    table: TableImage | None = None
    """The table that holds the images of a `datasets` source; its row is filled in for each sample."""

    @property
    def samples(self) -> Sequence[Sample]:
        return self

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        table = open_index(self.index_file)
        row = self.start + number % len(self)
        key, captions, path, offset, size = (table[name][row].as_py() for name in ("key", "captions", "path", "offset", "size"))
        image: Image = ImageLocation(path, offset, size)
        if self.table is not None:
            image = TableImage(self.table.path, self.table.split, self.table.column, offset)
        return Sample(key, {f"{key}#{i}": text for i, text in enumerate(captions) if text is not None}, image)

    def keyed_captions(self) -> list[tuple[str, str]]:
        """(caption key, caption) of every caption, in order."""
        keys, captions = self._captions("captions")
        return list(zip(keys.to_pylist(), captions.to_pylist(), strict=True))

    def sample_of(self, caption_key: str) -> str:
        return caption_key.rpartition("#")[0]

    def caption_keys_and_hashes(self) -> tuple[pa.Array, np.ndarray]:
        """Keys and `caption_hash` (uint64) of every caption, in order."""
        keys, hashes = self._captions("caption_hashes")
        return keys, hashes.to_numpy(zero_copy_only=False)

    def caption_hashes(self) -> np.ndarray:
        """uint64 of every caption, in the order of `keyed_captions`."""
        lists = open_index(self.index_file).slice(self.start, len(self))["caption_hashes"].combine_chunks()
        return lists.flatten().drop_null().to_numpy()

    def caption_counts(self) -> np.ndarray:
        """int64 [samples]: how many captions can be used."""
        table = open_index(self.index_file).slice(self.start, len(self))
        return _usable_counts(table["captions"].combine_chunks())

    def _captions(self, column: str) -> tuple[pa.Array, pa.Array]:
        table = open_index(self.index_file).slice(self.start, len(self))
        lists = table[column].combine_chunks()
        values = lists.flatten()
        owners = lists.value_parent_indices().to_numpy()
        counts = np.asarray(lists.value_lengths())
        position = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
        names = table["key"].combine_chunks().take(pa.array(owners))
        keys = pc.binary_join_element_wise(names, pc.cast(pa.array(position), pa.string()), "#")
        usable = values.is_valid()
        return keys.filter(usable), values.filter(usable)


def _usable_counts(lists: pa.Array) -> np.ndarray:
    owners = np.asarray(lists.value_parent_indices())[np.asarray(lists.flatten().is_valid())]
    return np.bincount(owners, minlength=len(lists)).astype(np.int64)


class Samples(Sequence[Sample]):
    """All shards one after the other."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        shard, place = self._place(range(len(self))[number])
        return shard[place]

    def __iter__(self) -> Iterator[Sample]:
        return (sample for shard in self.shards for sample in shard)

    def key(self, number: int) -> str:
        shard, place = self._place(number)
        return open_index(shard.index_file)["key"][shard.start + place].as_py()

    def shard_of(self, number: int) -> Shard:
        return self._place(number)[0]

    def _place(self, number: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.shards[shard], number - int(self.starts[shard])

    def captions(self) -> Iterator[str]:
        return (caption for shard in self.shards for _, caption in shard.keyed_captions())


def open_index(path: Path) -> pa.Table:
    """Memory-mapped; bounded, because a process may map 65,530 files by default."""
    return _mapped(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16_384)
def _mapped(path: Path, written: int) -> pa.Table:
    with pa.memory_map(path.as_posix()) as source:
        return pa.ipc.open_file(source).read_all()
