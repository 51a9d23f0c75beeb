"""`lift embed`: captions of a data source in, an embedding store out. Runs once, before any image is looked at."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.settings import EmbedSettings, TextEncoderSettings
from lift.sources import Shard, read_sources
from lift.store import EmbeddingStore, StoreWriter, storable
from lift.text_encoders import describe_text_encoder, load_text_encoder


def embed(settings: EmbedSettings) -> None:
    """Embeds every caption of every source, shard by shard; finished shards of an earlier, interrupted run are kept."""
    ledger = DropLedger()
    shards = read_sources(settings.data, ledger)
    total = sum(len(shard.samples) for shard in shards) + len(ledger)
    embed_shards(shards, settings.text_encoder, settings.out, ledger, settings.max_drop_fraction)
    print(f"{settings.out}: {len(EmbeddingStore(settings.out))} embeddings; {ledger.summary(total)}")


def embed_shards(
    shards: list[Shard], text_encoder: TextEncoderSettings, out: Path, ledger: DropLedger, max_drop_fraction: float
) -> None:
    """Writes the shards that are missing, then the manifest. A caption whose embedding is not finite goes to the ledger.

    Raises:
        UserError: the store was made by another encoder or of other data, or more samples are lost than allowed; then there
            is no manifest, and the next call looks at the finished shards again.
    """
    total = sum(len(shard.samples) for shard in shards) + len(ledger)
    if is_store_of(out, shards, text_encoder):
        print(f"{out}: embeddings are complete, reused")
        return
    encoder = load_text_encoder(text_encoder)
    writer = StoreWriter(out, describe_text_encoder(text_encoder), encoder.dimension)
    for shard in tqdm(shards, desc="embed captions", unit="shard"):
        if writer.has(shard.name):
            continue
        keyed = [(key, caption) for sample in shard.samples for key, caption in sample.captions.items()]
        embeddings = encoder.encode([caption for _, caption in keyed], progress=shard.name)
        finite = storable(embeddings, writer.dtype)
        kept = [pair for pair, ok in zip(keyed, finite, strict=True) if ok]
        writer.write_shard(shard.name, [k for k, _ in kept], [c for _, c in kept], embeddings[finite])
    # Told from the files, so that shards of an interrupted run are counted too.
    for shard in shards:
        embedded = set(writer.keys(shard.name))
        for sample in shard.samples:
            if lost := sample.captions.keys() - embedded:
                ledger.drop(sample.key, "embedding not finite", ", ".join(sorted(lost)))
    ledger.check(total, max_drop_fraction, out / "dropped.jsonl")
    writer.finish([shard.name for shard in shards])


def is_store_of(folder: Path, shards: list[Shard], text_encoder: TextEncoderSettings) -> bool:
    """True when `folder` holds a finished store of these shards made by this encoder.

    Raises:
        UserError: a finished store made by another encoder, or of other shards.
    """
    if not (folder / "manifest.json").is_file():
        return False
    store = EmbeddingStore(folder)
    wanted = describe_text_encoder(text_encoder)
    different = [key for key in wanted if store.manifest["encoder"].get(key) != wanted[key]]
    if different:
        found = {key: store.manifest["encoder"].get(key) for key in different}
        raise UserError(
            f"{folder}: the embedding store was made with {found}, but this run asks for "
            f"{ {key: wanted[key] for key in different} }. Give another folder (--embeddings), or the encoder of the store."
        )
    missing = {shard.name for shard in shards} - {entry["name"] for entry in store.manifest["shards"]}
    if missing and store.manifest["imported_from"] is None:  # imported shards are cut as they came; keys are matched later
        raise UserError(f"{folder}: the embedding store has no shard {sorted(missing)[0]}; it was made from other data.")
    return True
