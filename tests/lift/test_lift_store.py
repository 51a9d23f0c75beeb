"""The embedding store: round trip, matching of captions, restart, refusal; the text encoders that fill it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.embed import embed, embed_shards
from lift.settings import EmbedSettings, SourceSettings, TextEncoderSettings
from lift.sources import read_sources
from lift.store import EmbeddingStore, StoreWriter, storable, text_hashes
from lift.text_encoders import Encoded, load_text_encoder

DIMENSION = 40
VALUES = np.random.default_rng(0).normal(size=(60, DIMENSION)).astype(np.float32)
ENCODER = {"kind": "test"}


def make_store(folder: Path, sizes: tuple[int, ...] = (20, 0, 30, 10), **options: Any) -> EmbeddingStore:
    """Rows 0, 1, ... in shards `s0`, `s1`, ... of these sizes; row i has the key `ki` and the caption `ci`."""
    writer = StoreWriter(folder, ENCODER, DIMENSION, **options)
    captions_known = options.get("captions_known", True)
    start = 0
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        captions = [f"c{i}" for i in rows] if captions_known else None
        writer.write_shard(f"s{number}", [f"k{i}" for i in rows], captions, VALUES[start : start + size], truncated=number)
        start += size
    writer.finish([f"s{number}" for number in range(len(sizes))])
    return EmbeddingStore(folder)


def keys(rows: list[int]) -> list[str]:
    return [f"k{i}" for i in rows]


def hashes(rows: list[int]) -> np.ndarray:
    return text_hashes([f"c{i}" for i in rows])


def test_float16_rows_come_back_in_the_order_asked(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    order = np.random.default_rng(1).integers(0, 60, 200)
    rows = store.rows(order)
    assert rows.dtype == np.float16 and np.array_equal(rows, VALUES[order].astype(np.float16))
    assert np.array_equal(store.rows(order, dtype=np.float32), rows.astype(np.float32))
    assert store.rows(np.empty(0, np.int64)).shape == (0, DIMENSION)
    for outside in (-1, 60):
        with pytest.raises(IndexError):
            store.rows(np.array([3, outside]))


def test_int8_rows_come_back_near_and_in_order(tmp_path: Path) -> None:
    store = make_store(tmp_path, dtype="int8")
    order = np.random.default_rng(1).permutation(60)
    rows = store.rows(order)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, VALUES[order], atol=np.abs(VALUES).max() / 127 * 2 ** (1 / 8) / 2)
    assert np.array_equal(store.rows(order, dtype=np.float16), rows.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_cost_and_loss_are_stated_per_shard_and_in_the_manifest(tmp_path: Path, dtype: Any) -> None:
    store = make_store(tmp_path, dtype=dtype)
    stored = store.rows(np.arange(60), dtype=np.float32).astype(np.float64)
    cosine = (stored * VALUES).sum(1) / np.linalg.norm(stored, axis=1) / np.linalg.norm(VALUES.astype(np.float64), axis=1)
    assert store.manifest["mean_cosine_error"] == pytest.approx((1 - cosine).mean(), rel=1e-4)
    assert store.manifest["max_cosine_error"] == pytest.approx((1 - cosine).max(), rel=1e-4)
    assert store.manifest["truncated"] == 0 + 1 + 2 + 3
    files = sorted(tmp_path.glob("*.arrow"))
    assert store.manifest["bytes_per_caption"] == round(sum(file.stat().st_size for file in files) / 60, 3)
    for file, entry in zip(files, store.manifest["shards"], strict=True):
        metadata = pa.ipc.open_file(file.read_bytes()).schema.metadata
        assert float(metadata[b"bytes_per_caption"]) == pytest.approx(file.stat().st_size / max(1, entry["rows"]), abs=1e-3)
        assert float(metadata[b"mean_cosine_error"]) == entry["mean_cosine_error"]
        assert int(metadata[b"truncated"]) == entry["truncated"] == int(file.stem[1:])
    assert f"{dtype}, {store.manifest['bytes_per_caption']:.0f} bytes per caption" in store.summary()


def test_int8_at_the_width_of_an_llm_takes_under_4400_bytes_with_keys(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).normal(size=(64, 4096))
    writer = StoreWriter(tmp_path, ENCODER, 4096, "int8")
    writer.write_shard("a", [f"official/train-00000-of-00002/{i:012d}#0" for i in range(64)], ["c"] * 64, wide)
    writer.finish(["a"])
    assert (tmp_path / "a.arrow").stat().st_size / 64 < 4400
    assert EmbeddingStore(tmp_path).manifest["mean_cosine_error"] < 1e-4


@pytest.mark.parametrize("wanted", [list(range(20, 50)), [49, 20, 35], [3, 25, 59, 0, 58]])
def test_match_finds_rows_in_the_shard_and_elsewhere(tmp_path: Path, wanted: list[int]) -> None:
    """The shard as it is, a part of it in another order, and keys of other shards; all by list and by Arrow array."""
    store = make_store(tmp_path)
    for key in (keys(wanted), pa.array(keys(wanted), pa.large_string())):
        assert store.match("s2", key, hashes(wanted)).tolist() == wanted
    assert store.match("no such shard", keys(wanted), hashes(wanted)).tolist() == wanted


def test_match_refuses_unknown_keys_and_other_captions(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    other = text_hashes(["c20", "another caption", "c2", "c2"])
    assert store.match("s2", ["k20", "k21", "nowhere", "k2"], other).tolist() == [20, -1, -1, 2]
    assert store.match("s0", [], hashes([])).tolist() == []


def test_unknown_captions_match_by_key(tmp_path: Path) -> None:
    store = make_store(tmp_path, captions_known=False)
    assert store.manifest["captions"] == "unknown"
    assert store.match("s0", ["k1", "nowhere", "k59"], text_hashes(["any", "text", "at all"])).tolist() == [1, -1, 59]


def test_key_index_is_kept_and_goes_with_the_content(tmp_path: Path) -> None:
    make_store(tmp_path).match("", ["k5"], hashes([5]))
    (first,) = tmp_path.glob("key_index-*.npy")
    index = np.load(first)
    assert np.array_equal(index[0], np.sort(text_hashes(keys(list(range(60))))))
    written = first.stat().st_mtime_ns
    EmbeddingStore(tmp_path).match("", ["k5"], hashes([5]))
    assert first.stat().st_mtime_ns == written
    make_store(tmp_path, sizes=(20, 10, 30)).match("", ["k5"], hashes([5]))
    (second,) = tmp_path.glob("key_index-*.npy")
    assert second != first


def test_keys_whose_hashes_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hashes of one value for every three keys."""
    monkeypatch.setattr("lift.store.shard_file.text_hash", lambda text: int(text[1:]) // 3)
    monkeypatch.setattr("lift.store.reader.text_hashes", lambda texts: np.array([int(t[1:]) // 3 for t in texts], np.uint64))
    store = make_store(tmp_path)
    everything = list(range(60))
    assert store.match("", keys([*everything[::-1], 60, 61]), hashes([*everything[::-1], 60, 61])).tolist() == [
        *everything[::-1],
        -1,
        -1,
    ]


def test_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, ENCODER, DIMENSION)
    writer.write_shard("a", ["k0", "k1"], ["c", "c"], VALUES[:2])
    writer.write_shard("b", ["k2", "k1"], ["c", "c"], VALUES[2:4])
    with pytest.raises(UserError, match=r"the key 'k1' occurs 2 times, in a\.arrow and b\.arrow"):
        writer.finish(["a", "b"])
    assert not (tmp_path / "manifest.json").exists()


def test_rows_that_do_not_fit_are_refused_not_stored_as_infinity(tmp_path: Path) -> None:
    large = VALUES[:3].copy()
    large[1, 7] = 7e4
    assert storable(large, "float16").tolist() == [True, False, True]
    assert storable(large, "int8").all()
    with pytest.raises(UserError, match=r"'b' is not finite as float16.*int8 store"):
        StoreWriter(tmp_path / "half", ENCODER, DIMENSION).write_shard("a", ["a", "b", "c"], ["", "", ""], large)
    writer = StoreWriter(tmp_path / "int8", ENCODER, DIMENSION, "int8")
    writer.write_shard("a", ["a", "b", "c"], ["", "", ""], large)
    writer.finish(["a"])
    store = EmbeddingStore(tmp_path / "int8")
    assert store.rows(np.array([1]))[0, 7] == pytest.approx(7e4)
    with pytest.raises(UserError, match="float16's range"):
        store.rows(np.array([0, 1]), dtype=np.float16)
    for dtype in ("float16", "int8"):
        assert storable(np.array([[1.0, np.nan], [np.inf, 1], [0, 1]]), dtype).tolist() == [False, False, True]  # type: ignore[arg-type]


def test_damaged_and_foreign_stores_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path)
    with pytest.raises(UserError, match="holds embeddings with dtype float16"):
        StoreWriter(tmp_path, ENCODER, DIMENSION, "int8")
    shard = tmp_path / "s2.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"s2\.arrow: the manifest states \d+ bytes"):
        EmbeddingStore(tmp_path)
    with pytest.raises(UserError, match=r"s2\.arrow: expected a whole shard"):
        StoreWriter(tmp_path, ENCODER, DIMENSION).finish(["s2"])
    shard.write_bytes(whole)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(UserError, match="format 2, found 1"):
        EmbeddingStore(tmp_path)


def test_what_a_shard_dropped_is_kept_with_it(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, ENCODER, DIMENSION)
    dropped = [("k9", "embedding not finite", "line\nbreak, é")]
    writer.write_shard("a", ["k0"], ["c0"], VALUES[:1], dropped=dropped)
    assert writer.read("a").statistics.dropped == dropped


def test_sample_is_a_function_of_the_seed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    everything = store.rows(np.arange(60))
    assert np.array_equal(store.sample(60, 0), everything)
    first, again, other = (store.sample(10, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len({row.tobytes() for row in first} & {row.tobytes() for row in everything}) == 10


def test_interrupted_embedding_goes_on_and_gives_the_same_bytes(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    encoder = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), batch_tokens=100)
    shards = read_sources([SourceSettings(kind="webdataset", path=pairs)], DropLedger())
    embed_shards(shards, encoder, tmp_path / "whole", DropLedger(), 0.01)
    embed_shards(shards, encoder, tmp_path / "again", DropLedger(), 0.01)
    (tmp_path / "again" / "manifest.json").unlink()
    (tmp_path / "again" / f"{shards[1].name}.arrow").unlink()
    with pytest.raises(UserError, match="no such file"):
        EmbeddingStore(tmp_path / "again")
    embed_shards(shards, encoder, tmp_path / "again", DropLedger(), 0.01)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_store_of_another_encoder_is_refused(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    data = [SourceSettings(kind="webdataset", path=pairs)]
    first = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
    embed(EmbedSettings(data=data, out=tmp_path / "store", text_encoder=first))
    other = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), pooling="last")
    with pytest.raises(UserError, match="pooling"):
        embed(EmbedSettings(data=data, out=tmp_path / "store", text_encoder=other))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_causal_lm_embedding_does_not_depend_on_its_batch(tiny_llm: Path, pooling: str) -> None:
    captions = ["a", "a much longer caption than the others", "b c", "a"]
    together = load_text_encoder(TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), pooling=pooling, precision="fp32"))  # type: ignore[arg-type]
    alone = load_text_encoder(
        TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), pooling=pooling, batch_tokens=1, precision="fp32")  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(together.encode(captions), alone.encode(captions), atol=1e-5)
    assert np.array_equal(together.encode(captions)[0], together.encode(captions)[3])


def test_minilm_matches_sentence_transformers_and_knows_meaning() -> None:
    from sentence_transformers import SentenceTransformer

    from lift.minilm import minilm_folder

    captions = ["a dog runs on the beach", "a puppy is running by the sea", "the stock market fell"]
    ours = load_text_encoder(TextEncoderSettings(precision="fp32")).encode(captions)
    reference = SentenceTransformer(str(minilm_folder()), device="cpu").encode(captions)
    np.testing.assert_allclose(ours, reference, atol=1e-5)
    assert ours[0] @ ours[1] > 0.5 > 0.2 > ours[0] @ ours[2]


def test_missing_text_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text_encoder\.path"):
        load_text_encoder(TextEncoderSettings(kind="causal_lm", path=str(tmp_path / "nowhere")))


def test_embeddings_that_are_not_finite_are_counted_and_fail_the_store_again_and_again(
    pairs: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Encoder:
        dimension = 4

        def encode_counted(self, captions: list[str], progress: str | None = None, known: object = None) -> Encoded:
            values = np.ones((len(captions), 4), np.float32)
            values[[i for i, caption in enumerate(captions) if "000000005" in caption]] = np.nan
            return Encoded(values, truncated=0)

    monkeypatch.setattr("lift.embed.load_text_encoder", lambda settings: Encoder())
    source = SourceSettings(kind="webdataset", path=pairs)
    text_encoder = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
    settings = EmbedSettings(data=[source], out=tmp_path / "store", text_encoder=text_encoder)
    for _ in range(2):
        with pytest.raises(UserError, match="dropped 1 of 24 samples: 1 embedding not finite"):
            embed(settings)
        assert not (tmp_path / "store" / "manifest.json").exists()
    settings.max_drop_fraction = 0.1
    embed(settings)
    assert len(EmbeddingStore(tmp_path / "store")) == 47
