"""`lift import-embeddings`: the official layout, `.npy` and safetensors; faults counted or refused; restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lift.__main__ import COMMANDS
from lift.common.cli import run_command
from lift.common.errors import UserError
from lift.common.files import read_jsonl
from lift.common.ledger import DropLedger
from lift.embed import is_store_of
from lift.import_embeddings import import_embeddings
from lift.settings import ImportEmbeddingsSettings, SourceSettings, TextEncoderSettings
from lift.sources import read_sources
from lift.store import EmbeddingStore, text_hashes

VALUES = np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32)
Import = Callable[..., EmbeddingStore]


@pytest.fixture
def run(tiny_llm: Path, tmp_path: Path) -> Import:
    def run(kind: str, path: Path, **options: Any) -> EmbeddingStore:
        out = options.pop("out", tmp_path / "store")
        encoder = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
        import_embeddings(ImportEmbeddingsSettings(kind=kind, path=path, out=out, text_encoder=encoder, **options))  # type: ignore[arg-type]
        return EmbeddingStore(out)

    return run


def write_parquet(file: Path, keys: list[str | None], embeddings: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"key": pa.array(keys, pa.string()), "embedding": pa.array(embeddings, pa.list_(pa.float32()))}), file
    )


def rows_of(store: EmbeddingStore, keys: list[str]) -> np.ndarray:
    return store.match("", keys, text_hashes(keys))


def test_official_fixture_gives_the_keys_of_the_data_source(run: Import, shared: Path, tmp_path: Path) -> None:
    layout = shared / "fixtures" / "official_layout"
    with pytest.raises(UserError, match="dropped 2 of 20 samples: 2 embedding not finite"):
        run("official_parquet", layout / "caption_embeddings")
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert [row["key"] for row in read_jsonl(tmp_path / "store" / "dropped.jsonl")] == [
        "official_lift/train-00000-of-00002/000000000005#0",
        "official_lift/train-00001-of-00002/000000000015#0",
    ]
    store = run("official_parquet", layout / "caption_embeddings", max_drop_fraction=0.1)
    assert store.manifest["captions"] == "unknown" and len(store) == 18
    assert [entry["name"] for entry in store.manifest["shards"]] == [f"official_lift-train-0000{i}-of-00002" for i in range(2)]
    for folder in range(2):
        expected = np.load(layout / f"train-0000{folder}-of-00002_emb.npy")
        numbers = [i for i in range(10) if i != 5]
        keys = [f"official_lift/train-0000{folder}-of-00002/{folder * 10 + i:012d}#0" for i in numbers]
        rows = store.match(f"official_lift-train-0000{folder}-of-00002", keys, text_hashes(keys))
        np.testing.assert_allclose(store.rows(rows, dtype=np.float32), expected[numbers], rtol=1e-3, atol=1e-4)


def test_official_faults_are_counted_by_cause(run: Import, tmp_path: Path) -> None:
    folder = tmp_path / "parquet" / "part"
    write_parquet(folder / "2.parquet", ["a.jpg", "b"], [VALUES[0], [np.nan] * 16])
    write_parquet(
        folder / "10.parquet", ["c.tar", None, "d", "e", "a.png"], [VALUES[1], VALUES[2], VALUES[3][:5], None, VALUES[4]]
    )
    write_parquet(folder / "11.parquet", ["f"], [VALUES[5] * 1e5])
    (tmp_path / "parquet" / "notes").mkdir()
    store = run("official_parquet", tmp_path / "parquet", key_prefix="web/", key_suffix="#1", max_drop_fraction=0.9)
    assert rows_of(store, ["web/part/a#1", "web/part/c.tar#1"]).tolist() == [0, 1]
    np.testing.assert_array_equal(store.rows(np.arange(2)), VALUES[:2].astype(np.float16))
    dropped = {row["key"]: row["cause"] for row in read_jsonl(tmp_path / "store" / "dropped.jsonl")}
    assert dropped == {
        "web/part/a#1 (row 3)": "key occurs twice",
        "web/part/b#1": "embedding not finite",
        "web/part/10.parquet row 1": "no key",
        "web/part/d#1": "embedding of another dimension",
        "web/part/e#1": "embedding of another dimension",
        "web/part/f#1": "embedding beyond the range of float16",
    }
    wide = run("official_parquet", tmp_path / "parquet", dtype="int8", out=tmp_path / "int8", max_drop_fraction=0.9)
    (row,) = rows_of(wide, ["official_lift/part/f#0"])
    np.testing.assert_allclose(wide.rows(np.array([row]))[0], VALUES[5] * 1e5, atol=np.abs(VALUES[5]).max() * 1e5 / 200)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"key": pa.array(["a"]), "vector": pa.array([[1.0]])}, "key: string, vector: list"),
        ({"key": pa.array([1]), "embedding": pa.array([[1.0]])}, "key: int64"),
        ({"key": pa.array(["a"]), "embedding": pa.array([["x"]])}, "embedding: list<.*string"),
        ({"key": pa.array(["a"]), "embedding": pa.array([1.0])}, "embedding: double"),
    ],
)
def test_parquet_of_another_schema_is_refused_by_name(run: Import, tmp_path: Path, columns: dict, found: str) -> None:
    file = tmp_path / "parquet" / "part" / "0.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file)
    with pytest.raises(UserError, match=rf"part/0\.parquet: expected the columns key .*{found}"):
        run("official_parquet", tmp_path / "parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part/0\.parquet: not a whole parquet file"):
        run("official_parquet", tmp_path / "parquet")
    with pytest.raises(UserError, match="found none"):
        run("official_parquet", file.parent)


def test_interrupted_import_goes_on_and_gives_the_same_bytes(
    run: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(3):
        write_parquet(tmp_path / "parquet" / f"p{part}" / "0.parquet", ["a", "b"], [VALUES[part], [np.inf] * 16])
    run("official_parquet", tmp_path / "parquet", out=tmp_path / "whole", max_drop_fraction=0.5)
    from lift.store import StoreWriter

    write = StoreWriter.write_shard

    def dies_at_the_second(self: StoreWriter, shard: str, *arguments: Any, **options: Any) -> None:
        if shard.endswith("p1"):
            raise KeyboardInterrupt
        write(self, shard, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write_shard", dies_at_the_second)
        run("official_parquet", tmp_path / "parquet", out=tmp_path / "again", max_drop_fraction=0.5)
    assert [path.name for path in (tmp_path / "again").glob("*.arrow")] == ["official_lift-p0.arrow"]
    before = (tmp_path / "again" / "official_lift-p0.arrow").stat().st_mtime_ns
    run("official_parquet", tmp_path / "parquet", out=tmp_path / "again", max_drop_fraction=0.5)
    assert (tmp_path / "again" / "official_lift-p0.arrow").stat().st_mtime_ns == before
    assert {f.name for f in (tmp_path / "whole").iterdir()} == {f.name for f in (tmp_path / "again").iterdir()}
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    write_parquet(tmp_path / "parquet" / "p0" / "0.parquet", ["a", "b"], [VALUES[5], VALUES[6]])
    with pytest.raises(UserError, match="holds embeddings with imported_from"):
        run("official_parquet", tmp_path / "parquet", out=tmp_path / "again", max_drop_fraction=0.5)


def test_large_folders_are_cut_into_shards_by_whole_files(run: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift.import_embeddings.SHARD_SAMPLES", 4)
    for number in range(5):
        write_parquet(
            tmp_path / "parquet" / "p" / f"{number}.parquet", [f"{number}a", f"{number}b"], list(VALUES[2 * number :][:2])
        )
    store = run("official_parquet", tmp_path / "parquet")
    assert [(entry["name"], entry["rows"]) for entry in store.manifest["shards"]] == [
        ("official_lift-p-00000", 4),
        ("official_lift-p-00001", 4),
        ("official_lift-p-00002", 2),
    ]
    assert np.array_equal(store.rows(np.arange(10)), VALUES.astype(np.float16))


def test_training_takes_an_imported_store_whatever_its_shards_are_called(
    run: Import, pairs: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    shards = read_sources([SourceSettings(kind="webdataset", path=str(pairs))], DropLedger())
    keyed = [pair for shard in shards for pair in shard.keyed_captions()]
    np.save(tmp_path / "a.npy", np.tile(VALUES, (5, 1))[: len(keyed)])
    (tmp_path / "keys.jsonl").write_text("".join(json.dumps({"key": key, "caption": text}) + "\n" for key, text in keyed))
    store = run("npy", tmp_path / "a.npy", key_file=tmp_path / "keys.jsonl", key_format="jsonl")
    assert store.manifest["imported_from"].startswith("npy ")
    assert is_store_of(store.folder, shards, TextEncoderSettings(kind="causal_lm", path=str(tiny_llm)))
    found = np.concatenate([store.match(shard.name, *shard.caption_keys_and_hashes()) for shard in shards])
    assert np.array_equal(found, np.arange(len(keyed)))


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_arrays_with_keys_and_captions(run: Import, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift.import_embeddings.ROWS_PER_SHARD", 4)
    path = tmp_path / f"vectors.{kind}"
    if kind == "npy":
        np.save(path, VALUES.astype(np.float64))
    else:
        save_file({"other": torch.zeros(3), "text": torch.from_numpy(VALUES).bfloat16()}, path)
    captions = [f"caption {i} — «é»\u2028" for i in range(10)]
    keys = tmp_path / "keys.jsonl"
    keys.write_text(
        "".join(json.dumps({"key": f"k{i}", "caption": c}, ensure_ascii=False) + "\n" for i, c in enumerate(captions))
    )
    options: dict[str, Any] = {"key_file": keys, "key_format": "jsonl", "key_prefix": "coco/", "key_suffix": "#0"}
    store = run(kind, path, **options, tensor="text" if kind == "safetensors" else None)
    assert [entry["rows"] for entry in store.manifest["shards"]] == [4, 4, 2] and store.manifest["captions"] == "known"
    wanted = [f"coco/k{i}#0" for i in (9, 0, 5)]
    rows = store.match("", wanted, text_hashes([captions[i].strip() for i in (9, 0, 5)]))
    assert rows.tolist() == [9, 0, 5]
    assert store.match("", wanted, text_hashes(["a", "b", "c"])).tolist() == [-1, -1, -1]
    np.testing.assert_allclose(store.rows(rows, dtype=np.float32), VALUES[[9, 0, 5]], rtol=1e-2)


def test_plain_keys_leave_captions_unknown(run: Import, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    (tmp_path / "keys.txt").write_text("".join(f"web/{i} x#0\n" for i in range(10)))
    store = run("npy", tmp_path / "a.npy", key_file=tmp_path / "keys.txt")
    assert store.manifest["captions"] == "unknown"
    assert rows_of(store, ["web/3 x#0", "web/3"]).tolist() == [3, -1]


def test_arrays_that_do_not_fit_are_refused(run: Import, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("a\nb\n")
    np.save(tmp_path / "a.npy", VALUES)
    with pytest.raises(UserError, match=r"keys\.txt: expected one key for each of the 10 rows .* found 2"):
        run("npy", tmp_path / "a.npy", key_file=keys)
    for bad in (np.arange(10), np.zeros((2, 3), np.int32)):
        np.save(tmp_path / "b.npy", bad)
        with pytest.raises(UserError, match=r"b\.npy: expected an array of floats \[rows, dimension\], found int"):
            run("npy", tmp_path / "b.npy", key_file=keys)
    np.save(tmp_path / "c.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"c\.npy: expected a \.npy array of floats"):
        run("npy", tmp_path / "c.npy", key_file=keys)
    with pytest.raises(UserError, match=r"keys\.txt: not a safetensors file"):
        run("safetensors", keys, key_file=keys)
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="has the tensors x, y"):
        run("safetensors", tmp_path / "d.safetensors", key_file=keys)
    with pytest.raises(UserError, match=r"expected 'y' to hold floats \[rows, dimension\], found F32 \[2\]"):
        run("safetensors", tmp_path / "d.safetensors", key_file=keys, tensor="y")
    np.save(tmp_path / "e.npy", VALUES[:2])
    with pytest.raises(UserError, match=r"keys\.txt: expected an object with the strings key and caption for row 0, found b'a"):
        run("npy", tmp_path / "e.npy", key_file=keys, key_format="jsonl")


def test_settings_say_what_is_missing(tmp_path: Path) -> None:
    encoder = TextEncoderSettings()
    with pytest.raises(ValueError, match="say which one made the embeddings"):
        ImportEmbeddingsSettings(kind="npy", path=tmp_path, out=tmp_path, key_file=tmp_path)
    with pytest.raises(ValueError, match="npy needs a file with the keys"):
        ImportEmbeddingsSettings(kind="npy", path=tmp_path, out=tmp_path, text_encoder=encoder)
    with pytest.raises(ValueError, match="official_parquet has its keys"):
        ImportEmbeddingsSettings(kind="official_parquet", path=tmp_path, out=tmp_path, key_file=tmp_path, text_encoder=encoder)


def test_command(tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    (tmp_path / "keys.txt").write_text("\n".join("abcdefghij"))
    source = ["--kind", "npy", "--path", str(tmp_path / "a.npy"), "--key_file", str(tmp_path / "keys.txt")]
    arguments = ["import-embeddings", *source, "--out", str(tmp_path / "store"), "--dtype", "int8"]
    assert run_command("lift", COMMANDS, arguments) == 2
    assert "text_encoder: say which one made the embeddings" in capsys.readouterr().err
    encoder = ["--text_encoder.kind", "causal_lm", "--text_encoder.path", str(tiny_llm), "--text_encoder.max_length", "323"]
    assert run_command("lift", COMMANDS, [*arguments, *encoder]) == 0
    assert "10 embeddings, int8, " in capsys.readouterr().out
    assert EmbeddingStore(tmp_path / "store").manifest["encoder"]["max_length"] == 323
