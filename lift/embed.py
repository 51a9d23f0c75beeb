"""`lift embed`: captions of a data source or a plain list in, an embedding store out. Runs once, before any image is looked at.

The shard is the unit of work: `embed_shard` embeds one and writes its file, or checks the file that an earlier run wrote.
An engine calls it for every shard, in this process or on a Ray cluster; the driver keeps lock, drop ledger and manifest.
Captions that several shards hold are embedded before, as shards of their own (`lift/repeated.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from lift.captions import read_captions
from lift.common.errors import UserError
from lift.common.files import locked_folder, sweep
from lift.common.ledger import DropLedger
from lift.repeated import DTYPE as REPEATED_DTYPE
from lift.repeated import FOLDER as REPEATED
from lift.repeated import look_up, repeated_captions
from lift.settings import EmbedSettings, TextEncoderSettings
from lift.sources import read_sources
from lift.store import EmbeddingStore, StoreDtype, StoreWriter, storable, text_hash
from lift.store.shard_file import Drop, ShardFile, read_shard_file
from lift.text_encoders import TextEncoder, describe_text_encoder, different_encoder, load_text_encoder


class CaptionShard(Protocol):
    """A unit of work. It can be pickled: on a cluster it is read where it is embedded."""

    @property
    def name(self) -> str: ...

    def keyed_captions(self) -> list[tuple[str, str]]:
        """(caption key, caption)."""
        ...

    def caption_hashes(self) -> np.ndarray:
        """uint64, `text_hash` of each of these captions."""
        ...

    def sample_of(self, caption_key: str) -> str:
        """Key of the sample that the caption belongs to, for the drop ledger."""
        ...


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard."""

    name: str
    samples: int
    dropped: list[Drop]
    """Samples of which a caption has no row, because its embedding cannot be stored."""


@dataclass(frozen=True)
class Engine:
    """A loaded text encoder, or several, and how shards get to it."""

    dimension: int
    run: Callable[[Sequence[CaptionShard], StoreWriter], Iterator[ShardReport]]
    """Applies `embed_shard` to all shards; the reports come in any order."""


OpenEngine = Callable[[TextEncoderSettings], AbstractContextManager[Engine]]


def embed(settings: EmbedSettings) -> None:
    """Embeds every caption of every source, shard by shard; finished shards of an earlier, interrupted run are kept.

    Raises:
        UserError: as `read_sources`, `read_captions` and `embed_shards`, or a finished store that holds other captions.
    """
    ledger = DropLedger()
    shards = _read_shards(settings, ledger)
    if is_store_of(settings.out, shards, settings.text_encoder, settings.dtype):
        store = EmbeddingStore(settings.out)
        bar = tqdm(shards, desc="check embeddings", unit="shard")
        files = (read_shard_file(settings.out / f"{shard.name}.arrow", store.dimension, store.dtype) for shard in shards)
        total = _account((_check_shard(shard, file, settings.out) for shard, file in zip(bar, files, strict=True)), ledger)
        print(f"{settings.out}: embeddings are complete, reused")
    else:
        total = _embed_missing(
            shards, settings.text_encoder, settings.out, ledger, settings.max_drop_fraction, settings.dtype, _engine(settings)
        )
    print(f"{settings.out}: {EmbeddingStore(settings.out).summary()}; {ledger.summary(total)}")


def _read_shards(settings: EmbedSettings, ledger: DropLedger) -> Sequence[CaptionShard]:
    if settings.captions is None:
        return read_sources(settings.data, ledger)
    assert settings.captions_format is not None
    return read_captions(settings.captions, settings.captions_format, settings.shard_size, ledger)


def _engine(settings: EmbedSettings) -> OpenEngine:
    if settings.engine == "local":
        return local_engine
    try:
        from lift.ray_engine import ray_engine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("engine ray: the package ray is not installed. Run: pip install 'lift-toolkit[ray]'") from error
    return partial(ray_engine, workers=settings.workers, address=settings.ray_address, gpus_per_worker=settings.gpus_per_worker)


def embed_shards(
    shards: Sequence[CaptionShard], text_encoder: TextEncoderSettings, out: Path, ledger: DropLedger, max_drop_fraction: float
) -> None:
    """Makes the store of these shards in this process, as float16, unless it is there, of whatever storage type.

    Raises:
        UserError: the store was made by another encoder or of other data, another job is writing it, or more samples are lost
            than allowed; then there is no manifest, and the next call looks at the finished shards again.
    """
    if is_store_of(out, shards, text_encoder):
        print(f"{out}: embeddings are complete, reused")
    else:
        _embed_missing(shards, text_encoder, out, ledger, max_drop_fraction, "float16", local_engine)


@contextmanager
def local_engine(text_encoder: TextEncoderSettings) -> Iterator[Engine]:
    """One encoder in this process."""
    encoder = load_text_encoder(text_encoder)
    yield Engine(
        encoder.dimension, lambda shards, writer: (embed_shard(shard, encoder, writer, shard.name) for shard in shards)
    )


def _embed_missing(
    shards: Sequence[CaptionShard],
    text_encoder: TextEncoderSettings,
    out: Path,
    ledger: DropLedger,
    max_drop_fraction: float,
    dtype: StoreDtype,
    open_engine: OpenEngine,
) -> int:
    """Writes the shards that are missing, then the manifest; returns the number of samples."""
    with locked_folder(out):
        names = [shard.name for shard in shards]
        foreign = sorted({path.stem for path in out.glob("*.arrow")} - set(names))
        if foreign:
            raise UserError(
                f"{out}: holds the shard {foreign[0]}, which is not of this data. Choose another folder, or delete this one."
            )
        description = describe_text_encoder(text_encoder)
        with open_engine(text_encoder) as engine:
            writer = StoreWriter(out, description, engine.dimension, dtype)
            if not all(map(writer.has, names)):
                _embed_repeated(shards, writer, description, engine)
            reports = engine.run(shards, writer)
            total = _account(tqdm(reports, total=len(shards), desc="embed captions", unit="shard"), ledger)
        shutil.rmtree(out / REPEATED, ignore_errors=True)
        sweep(out)
        ledger.check(total, max_drop_fraction, out / "dropped.jsonl")
        writer.finish(names)
    return total


def _embed_repeated(shards: Sequence[CaptionShard], writer: StoreWriter, description: dict[str, Any], engine: Engine) -> None:
    """Embeds the captions that several shards hold, where `embed_shard` looks them up."""
    units = repeated_captions(shards)
    folder = writer.folder / REPEATED
    with locked_folder(folder):
        for path in folder.glob("*.arrow"):
            if path.stem not in {unit.name for unit in units}:
                path.unlink()  # of captions that were other ones then
        advance = StoreWriter(folder, description, writer.dimension, REPEATED_DTYPE)
        for _ in tqdm(engine.run(units, advance), total=len(units), desc="embed repeated captions", unit="unit"):
            pass


def embed_shard(shard: CaptionShard, encoder: TextEncoder, writer: StoreWriter, progress: str | None = None) -> ShardReport:
    """Embeds the captions in one call of the encoder and writes the shard's file; a file that is there is checked instead.

    Captions that were embedded in advance are not embedded again. A caption whose embedding cannot be stored is left out and
    reported.
    """
    if writer.has(shard.name):
        return _check_shard(shard, writer.read(shard.name), writer.folder)
    keyed = shard.keyed_captions()
    captions = [caption for _, caption in keyed]
    encoded = encoder.encode_counted(captions, progress, look_up(writer.folder / REPEATED, writer.dimension, captions))
    fits = storable(encoded.embeddings, writer.dtype)
    lost: dict[str, list[str]] = {}
    for number in np.flatnonzero(~fits):
        lost.setdefault(shard.sample_of(keyed[number][0]), []).append(keyed[number][0])
    dropped = [(sample, "embedding not finite", ", ".join(keys)) for sample, keys in lost.items()]
    kept = [keyed[number] for number in np.flatnonzero(fits)]
    writer.write_shard(
        shard.name,
        [key for key, _ in kept],
        [caption for _, caption in kept],
        encoded.embeddings[fits],
        encoded.truncated,
        dropped,
    )
    return ShardReport(shard.name, _count_samples(shard, keyed), dropped)


def _check_shard(shard: CaptionShard, stored: ShardFile, store: Path) -> ShardReport:
    """The report on a shard that an earlier run wrote.

    Raises:
        UserError: the file was not made of the captions that the shard has now.
    """
    keyed = shard.keyed_captions()
    hashes = dict(zip(stored.keys.to_pylist(), stored.caption_hashes.tolist(), strict=True))
    dropped = {key for key, _, _ in stored.statistics.dropped}
    for key, caption in keyed:
        found = hashes.pop(key, None)
        if found != text_hash(caption) and (found is not None or shard.sample_of(key) not in dropped):
            raise _other_captions(store, shard, key)
    if hashes:
        raise _other_captions(store, shard, next(iter(hashes)))
    return ShardReport(shard.name, _count_samples(shard, keyed), stored.statistics.dropped)


def _other_captions(store: Path, shard: CaptionShard, key: str) -> UserError:
    return UserError(
        f"{store / shard.name}.arrow: the caption '{key}' is not what was embedded; the data has changed since. Choose another "
        "folder for the store, or delete this one."
    )


def _count_samples(shard: CaptionShard, keyed: list[tuple[str, str]]) -> int:
    return len({shard.sample_of(key) for key, _ in keyed})


def _account(reports: Iterable[ShardReport], ledger: DropLedger) -> int:
    """Fills the ledger; returns the number of samples, those that the ledger had before included."""
    total = len(ledger)
    for report in reports:
        total += report.samples
        for drop in report.dropped:
            ledger.drop(*drop)
    return total


def is_store_of(
    folder: Path, shards: Sequence[CaptionShard], text_encoder: TextEncoderSettings, dtype: StoreDtype | None = None
) -> bool:
    """True when `folder` holds a finished store of these shards made by this encoder, stored as `dtype` where that is given.

    Raises:
        UserError: a finished store made by another encoder, with another storage type, or of other shards.
    """
    if not (folder / "manifest.json").is_file():
        return False
    manifest = EmbeddingStore(folder).manifest
    different = different_encoder(text_encoder, manifest["encoder"])
    if dtype and manifest["dtype"] != dtype:
        different["dtype"] = dtype
    if different:
        found = manifest["encoder"] | {"dtype": manifest["dtype"]}
        raise UserError(
            f"{folder}: the embedding store was made with { {key: found.get(key) for key in different} }, but this run asks "
            f"for {different}. Give another folder, or the settings of the store."
        )
    missing = {shard.name for shard in shards} - {entry["name"] for entry in manifest["shards"]}
    if missing and manifest["imported_from"] is None:  # imported shards are cut as they came; keys are matched later
        raise UserError(f"{folder}: the embedding store has no shard {sorted(missing)[0]}; it was made from other data.")
    return True
