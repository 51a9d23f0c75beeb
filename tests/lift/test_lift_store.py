"""The embedding store: round trip, restart, refusal; the text encoders and transforms that fill it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.embed import embed, embed_shards
from lift.settings import EmbedSettings, SourceSettings, TextEncoderSettings
from lift.sources import read_sources
from lift.store import EmbeddingStore, StoreWriter
from lift.text_encoders import load_text_encoder
from lift.transforms import TextTransform


def test_rows_come_back_by_key_and_only_for_the_same_caption(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 8))
    writer = StoreWriter(tmp_path, {"kind": "test"}, 8)
    writer.write_shard("a", ["k0", "k1"], ["c0", "c1"], values[:2])
    writer.write_shard("b", ["k2", "k3", "k4"], ["c2", "c3", "c4"], values[2:])
    writer.finish(["a", "b"])
    store = EmbeddingStore(tmp_path)
    rows = [store.find(f"k{i}", f"c{i}") for i in (4, 0, 2)]
    assert np.array_equal(store.rows(np.array(rows)), values[[4, 0, 2]].astype(np.float16).astype(np.float32))
    assert store.find("k1", "another caption") is None
    assert store.find("nowhere", "c1") is None
    assert [entry["rows"] for entry in store.manifest["shards"]] == [2, 3]


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
    together = load_text_encoder(TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), pooling=pooling))  # type: ignore[arg-type]
    alone = load_text_encoder(
        TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), pooling=pooling, batch_tokens=1)  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(together.encode(captions), alone.encode(captions), atol=1e-5)
    assert np.array_equal(together.encode(captions)[0], together.encode(captions)[3])


def test_minilm_matches_sentence_transformers_and_knows_meaning() -> None:
    from sentence_transformers import SentenceTransformer

    from lift.minilm import minilm_folder

    captions = ["a dog runs on the beach", "a puppy is running by the sea", "the stock market fell"]
    ours = load_text_encoder(TextEncoderSettings()).encode(captions)
    reference = SentenceTransformer(str(minilm_folder()), device="cpu").encode(captions)
    np.testing.assert_allclose(ours, reference, atol=1e-5)
    assert ours[0] @ ours[1] > 0.5 > 0.2 > ours[0] @ ours[2]


def test_missing_text_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text_encoder\.path"):
        load_text_encoder(TextEncoderSettings(kind="causal_lm", path=str(tmp_path / "nowhere")))


def test_transforms_centre_and_whiten() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(4000, 6, generator=generator) * torch.tensor([5.0, 3, 2, 1, 1, 1]) + 3
    unit_ND = torch.nn.functional.normalize(x_ND, dim=-1)
    none = TextTransform("none", 6)
    torch.testing.assert_close(none(x_ND), unit_ND)
    centre = TextTransform("centre", 6)
    centre.fit(x_ND, 0.0)
    torch.testing.assert_close(centre.mean_D, unit_ND.mean(0), atol=1e-6, rtol=0)
    whiten = TextTransform("whiten", 6)
    whiten.fit(x_ND, 0.0)
    white_ND = (unit_ND - whiten.mean_D) @ whiten.matrix_DD
    torch.testing.assert_close(white_ND.T @ white_ND / len(white_ND), torch.eye(6), atol=1e-3, rtol=0)
    for transform in (none, centre, whiten):
        torch.testing.assert_close(transform(x_ND).norm(dim=-1), torch.ones(len(x_ND)))


def test_embeddings_that_are_not_finite_are_counted_and_fail_the_store_again_and_again(
    pairs: Path, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Encoder:
        dimension = 4

        def encode(self, captions: list[str], progress: str | None = None) -> np.ndarray:
            values = np.ones((len(captions), 4), np.float32)
            values[[i for i, caption in enumerate(captions) if "000000005" in caption]] = np.nan
            return values

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
