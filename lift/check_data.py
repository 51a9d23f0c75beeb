"""`lift check-data`: reads a source once, images and captions, and says whether a run can use it.

What cannot be used goes to the same drop ledger with the same causes as in a run, so that the drop share is the one to expect.
"""

from __future__ import annotations

import multiprocessing
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.files import sha256_bytes, write_json
from lift.common.images import ImageFault, decode_image, image_fault
from lift.common.ledger import DropLedger
from lift.minilm import minilm_folder
from lift.settings import CheckDataSettings
from lift.sources import Samples, Shard, read_sources, repeated_keys
from lift.sources.samples import read_images
from lift.store import EmbeddingStore

CHUNK = 256
"""Images that a process looks at before it answers."""
QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def check_data(settings: CheckDataSettings) -> None:
    """Prints the report and writes it to OUT/report.json, with OUT/dropped.jsonl beside it.

    Raises:
        UserError: the source cannot be read; or, with the report there, a larger share than `max_drop_fraction` cannot be used,
            or a key is repeated.
    """
    ledger = DropLedger()
    shards = read_sources(settings.data, ledger, refuse_repeated_keys=False)
    samples = Samples(shards)
    total = len(samples) + len(ledger)
    report: dict[str, Any] = {"images": len(samples), "captions": sum(int(shard.caption_counts().sum()) for shard in shards)}
    report["tokens"] = _caption_lengths(samples, settings)
    report |= _images(shards, settings.workers, ledger)
    repeated = list(repeated_keys(shards))
    report["repeated_keys"] = len(repeated)
    report["repeated_captions"] = _repeated(np.concatenate([shard.caption_hashes() for shard in shards]))
    if settings.embeddings is not None:
        report["captions_without_embedding"] = _without_embedding(EmbeddingStore(settings.embeddings), shards, ledger)
    report |= {"dropped": ledger.counts(), "drop_share": round(len(ledger) / total, 6)}
    report["usable"] = not repeated and len(ledger) <= settings.max_drop_fraction * total
    write_json(settings.out / "report.json", report)
    _print(report)
    print(f"{settings.out / 'report.json'}: {ledger.summary(total)}")
    ledger.check(total, settings.max_drop_fraction, settings.out / "dropped.jsonl")
    if repeated:
        raise UserError(f"{len(repeated)} keys are repeated, which a run refuses; {repeated[0]}.")


def _caption_lengths(samples: Samples, settings: CheckDataSettings) -> dict[str, Any]:
    """Distribution of the tokens of a caption, special tokens included."""
    from transformers import AutoTokenizer  # seconds to import

    name = settings.tokenizer or str(minilm_folder())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name}: no tokenizer can be loaded from there: {error}") from error
    lengths = array("I")
    for shard in samples.shards:
        captions = [caption for _, caption in shard.keyed_captions()]
        lengths.extend(map(len, tokenizer(captions, truncation=False, verbose=False)["input_ids"]))
    over = int((np.asarray(lengths) > settings.max_length).sum())
    return {
        "tokenizer": settings.tokenizer or "all-MiniLM-L6-v2",
        **_distribution(lengths),
        f"over_{settings.max_length}": over,
    }


@dataclass(frozen=True)
class _Look:
    """What decoding one image told."""

    key: str
    fault: tuple[str, str] | None
    """Cause and detail."""
    width: int = 0
    height: int = 0
    content: int = 0
    """Hash of the file."""


def _look_at(chunk: tuple[Shard, int, int]) -> list[_Look]:
    shard, start, stop = chunk
    samples = shard[start:stop]
    looks = []
    for sample, content in zip(samples, read_images([sample.image for sample in samples]), strict=True):
        try:
            if isinstance(content, OSError):
                raise content
            image = decode_image(content)
            looks.append(_Look(sample.key, None, image.width, image.height, int(sha256_bytes(content)[:16], 16)))
        except (OSError, ImageFault) as error:
            looks.append(_Look(sample.key, image_fault(error)))
    return looks


def _images(shards: list[Shard], workers: int, ledger: DropLedger) -> dict[str, Any]:
    chunks = [(shard, start, min(start + CHUNK, len(shard))) for shard in shards for start in range(0, len(shard), CHUNK)]
    widths, heights, contents = array("I"), array("I"), array("Q")
    for look in tqdm(_looks(chunks, workers), total=sum(map(len, shards)), desc="decode images", unit="image"):
        if look.fault is not None:
            ledger.drop(look.key, *look.fault)
            continue
        widths.append(look.width)
        heights.append(look.height)
        contents.append(look.content)
    return {
        "width": _distribution(widths),
        "height": _distribution(heights),
        "repeated_images": _repeated(np.asarray(contents)),
    }


def _looks(chunks: list[tuple[Shard, int, int]], workers: int) -> Iterator[_Look]:
    if workers == 0:
        for chunk in chunks:
            yield from _look_at(chunk)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for looks in pool.map(_look_at, chunks):
            yield from looks


def _without_embedding(store: EmbeddingStore, shards: list[Shard], ledger: DropLedger) -> int:
    lost = 0
    for shard in shards:
        keys, hashes = shard.caption_keys_and_hashes()
        absent = np.flatnonzero(store.match(shard.name, keys, hashes) < 0)
        lost += len(absent)
        for number in absent:
            key = keys[int(number)].as_py()
            ledger.drop(key.rpartition("#")[0], "no embedding of a caption", key)
    return lost


def _repeated(hashes: np.ndarray) -> int:
    return len(hashes) - len(np.unique(hashes))


def _distribution(values: array) -> dict[str, float]:
    if not values:
        return {}
    quantiles = {name: int(np.quantile(values, share, method="higher")) for name, share in QUANTILES.items()}
    return {"mean": round(float(np.mean(values)), 1), **quantiles}


def _print(report: dict[str, Any]) -> None:
    for name, value in report.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) or "none" if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):<28}{shown}")
