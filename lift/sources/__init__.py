"""Image-caption sources: settings in, shards of samples out, each sample with a key, its captions and where its image lies.

One module for each kind of source; `samples` is what the rest of the toolkit sees of them, `index` what lies on disk between.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lift.common.errors import UserError
from lift.common.files import sha256_text
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.sources import official, tables, webdataset
from lift.sources.index import Kind, Origin, build_index, read_summary, summary_path
from lift.sources.json_files import JsonFile, coco_records, llava_records
from lift.sources.packs import packed
from lift.sources.samples import Sample, Samples, Shard, TableImage, open_index

__all__ = ["Sample", "Samples", "Shard", "read_sources"]

KINDS: dict[str, Kind] = {
    "webdataset": webdataset,
    "official_lift": official,
    "coco_captions": JsonFile(coco_records),
    "llava_json": JsonFile(llava_records),
    "hf_dataset": tables,
}
SHARD_SAMPLES = 10_000
"""Samples in a shard at most: what an interrupted embedding does again."""
INDEXED_IN_PLACE = 8
"""So many files are indexed faster by this process than others are started."""


def read_sources(
    sources: list[SourceSettings], ledger: DropLedger, first: bool = True, refuse_repeated_keys: bool = True
) -> list[Shard]:
    """All sources in order, indexed where they are not yet.

    Args:
        first: False in processes that start after one that has looked for images that were missing, and for repeated keys.
    Raises:
        UserError: a source is missing, unreadable or empty, or two samples have the same key.
    """
    parts = [(source, origin) for source in sources for origin in KINDS[source.kind].origins(source)]
    _refuse_double_names([f"{source.name}-{origin.stem}" for source, origin in parts])
    _build(parts, first)
    summaries = [_summary(source, origin) for source, origin in parts]
    places = packed([(Path(summary["index"]), summary["rows"]) for summary in summaries])
    shards: list[Shard] = []
    for (source, origin), summary, (index, first_row) in zip(parts, summaries, places, strict=True):
        for drop in summary["dropped"]:
            ledger.drop(*drop)
        shards += _shards(source, origin, summary, index, first_row)
    if not shards:
        raise UserError(f"{', '.join(s.path for s in sources)}: no usable image-caption pair. {ledger.summary(len(ledger))}.")
    if first and refuse_repeated_keys and (repeated := next(repeated_keys(shards), None)):
        raise UserError(f"{repeated}. Mend the files, or give the sources different names (data.name).")
    return shards


def _build(parts: list[tuple[SourceSettings, Origin]], look_again: bool) -> None:
    processes = len(os.sched_getaffinity(0))
    build = partial(_build_one, look_again=look_again)
    if len(parts) <= INDEXED_IN_PLACE or processes == 1:
        faults = [fault for fault in map(build, parts) if fault]
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            faults = [fault for fault in pool.map(build, parts, chunksize=4) if fault]
    if faults:
        more = f" ({len(faults)} files are faulty: {'; '.join(faults[1:6])})" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)


def _build_one(part: tuple[SourceSettings, Origin], look_again: bool) -> str | None:
    """What is wrong with the file, or None."""
    source, origin = part
    try:
        build_index(KINDS[source.kind], source, origin, look_again)
    except UserError as error:
        return str(error)
    return None


def _summary(source: SourceSettings, origin: Origin) -> dict[str, Any]:
    summary = read_summary(summary_path(source, origin))
    assert summary is not None  # it has just been built
    return summary


def _shards(source: SourceSettings, origin: Origin, summary: dict[str, Any], index: Path, first_row: int) -> Iterator[Shard]:
    """The samples of one origin in parts; its rows begin at `first_row` of the file `index`."""
    table = TableImage(source.path, source.split, source.image_field, -1) if source.kind == "hf_dataset" else None
    starts = range(0, summary["rows"], SHARD_SAMPLES)
    name = f"{source.name}-{origin.stem}"
    for number, start in enumerate(starts):
        stop = min(start + SHARD_SAMPLES, summary["rows"])
        part = name if len(starts) == 1 else f"{name}-{number:05d}"
        yield Shard(part, index, first_row + start, first_row + stop, summary["content"], table)


def content_hash(shards: list[Shard]) -> str:
    """Hash over the keys and captions of all shards in their order, which decide what every step of a run sees."""
    return sha256_text("\n".join(dict.fromkeys(shard.content for shard in shards)))


def _refuse_double_names(names: list[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"two sources have a shard '{name}'. Give the sources different names (data.name).")


def repeated_keys(shards: list[Shard]) -> Iterator[str]:
    """What is wrong, for each key that occurs again.

    Looks for hashes that repeat, 16 bytes a sample, and then at their keys, since two keys may share a hash.
    """
    samples = Samples(shards)
    hashes = np.empty(len(samples), np.uint64)
    for shard, start in zip(shards, samples.starts, strict=False):
        # copied, because a process may not map a hundred thousand files at once
        hashes[start : start + len(shard)] = open_index(shard.index_file)["key_hash"].slice(shard.start, len(shard)).to_numpy()
    in_order = np.sort(hashes)
    repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    shard_of: dict[str, str] = {}
    for number in np.flatnonzero(np.isin(hashes, repeated)):
        key, name = samples.key(int(number)), samples.shard_of(int(number)).name
        if key in shard_of:
            yield f"key '{key}' of {shard_of[key]} occurs twice, again in {name}"
        shard_of[key] = name
