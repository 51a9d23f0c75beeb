"""`lift pretrain` end to end on a tiny model: resume, equal start, damaged images, export that plain transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny import encoded, noise_image, tiny_pretrain, write_tar

from lift.common.errors import UserError
from lift.encoder import load_encoder
from lift.import_embeddings import import_embeddings
from lift.model import build_clip, build_lift
from lift.run_folder import checkpoints
from lift.settings import (
    ClipTextSettings,
    ImportEmbeddingsSettings,
    PretrainSettings,
    SourceSettings,
    TextEncoderSettings,
    TextTransformSettings,
    VisionSettings,
)
from lift.store import EmbeddingStore, text_hashes
from lift.text_side import clip_tokenizer
from lift.train import learning_rate_at, pretrain
from lift.transforms import TextTransform


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("objective", ["contrastive", "cosine", "clip"])
def test_resumed_run_equals_uninterrupted_one(
    pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tiny_pretrain(pairs, tiny_llm, tmp_path / "whole", objective))
    cut = tiny_pretrain(pairs, tiny_llm, tmp_path / "cut", objective)
    from lift.train import _Loop

    step = _Loop._step

    def dies_at_step_seven(self: _Loop, number: int, batch: object) -> dict:
        if number == 7:
            raise Killed
        return step(self, number, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(_Loop, "_step", dies_at_step_seven)
    with pytest.raises(Killed):
        pretrain(cut)
    assert [path.name for path in checkpoints(cut.out)] == ["step_00000003", "step_00000006"]
    assert not (cut.out / "encoder").exists()
    monkeypatch.undo()
    pretrain(replace(cut, workers=2))
    whole, again = (load_file(checkpoints(tmp_path / run)[-1] / "model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == again.keys()
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
    volatile = ("samples_per_second", "data_wait_share", "mfu")
    assert [{k: v for k, v in row.items() if k not in volatile} for row in rows(tmp_path / "whole")] == [
        {k: v for k, v in row.items() if k not in volatile} for row in rows(tmp_path / "cut")
    ]


def test_lift_and_clip_log_the_same_keys_and_both_learn(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    for objective in ("contrastive", "clip"):
        pretrain(tiny_pretrain(pairs, tiny_llm, tmp_path / objective, objective))
    lift, clip = rows(tmp_path / "contrastive"), rows(tmp_path / "clip")
    assert [row["keys"] for row in lift] == [row["keys"] for row in clip]
    assert len({row["keys"] for row in lift}) == len(lift) == 12
    for run in (lift, clip):
        assert run[-1]["loss"] < run[0]["loss"]
    start_lift, start_clip = (json.loads((tmp_path / run / "finished.json").read_text()) for run in ("contrastive", "clip"))
    assert start_lift["steps"] == start_clip["steps"] == 12


def test_finished_run_is_reused_and_other_settings_are_refused(
    pairs: Path, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path / "run")
    pretrain(settings)
    written = (settings.out / "encoder" / "model.safetensors").stat().st_mtime_ns
    pretrain(replace(settings, workers=1))
    assert "reused" in capsys.readouterr().out
    assert (settings.out / "encoder" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="learning_rate"):
        pretrain(replace(settings, learning_rate=0.5))


def test_damaged_image_is_dropped_by_name_and_too_many_fail_the_run(tiny_llm: Path, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(16):
        whole = encoded(noise_image(i, (64, 64)), "jpeg")
        members[f"{i}.jpg"] = whole[: len(whole) // 3] if i == 5 else whole
        members[f"{i}.txt"] = f"caption {i}".encode()
    write_tar(tmp_path / "pairs" / "0.tar", members)
    settings = replace(tiny_pretrain(tmp_path / "pairs", tiny_llm, tmp_path / "run"), max_drop_fraction=0.1)
    pretrain(settings)
    (row,) = [json.loads(line) for line in (settings.out / "dropped.jsonl").read_text().splitlines()]
    assert (row["key"], row["cause"]) == ("webdataset/5", "undecodable image")
    strict = replace(settings, out=tmp_path / "strict", embeddings=None, max_drop_fraction=0.01)
    with pytest.raises(UserError, match="dropped 1 of 16 samples: 1 undecodable image"):
        pretrain(strict)
    assert not (tmp_path / "strict" / "encoder").exists()
    assert not (tmp_path / "strict" / "finished.json").exists()


def test_learning_rate_follows_the_official_schedule(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    settings = replace(tiny_pretrain(pairs, tiny_llm, tmp_path), learning_rate=1.0, warmup_steps=500)
    assert learning_rate_at(0, 10_000, settings) == 1 / 500
    assert learning_rate_at(499, 10_000, settings) == 1.0
    assert learning_rate_at(500 + 4750, 10_000, settings) == pytest.approx(0.5)
    assert learning_rate_at(9_999, 10_000, settings) < 1e-6


PLAIN = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lift", "lmm", "eval", "demo"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
try:
    import lift
    raise SystemExit("lift is importable")
except ModuleNotFoundError:
    pass
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel
folder, out = sys.argv[1:]
model, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
pixels = CLIPImageProcessor.from_pretrained(folder)(images=Image.new("RGB", (20, 16), (200, 30, 90)), return_tensors="pt")
torch.save(model(**pixels).last_hidden_state.detach(), out)
"""


@pytest.mark.parametrize("objective", ["contrastive", "clip"])
def test_encoder_folder_loads_in_plain_transformers(pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str) -> None:
    from PIL import Image

    pretrain(tiny_pretrain(pairs, tiny_llm, tmp_path / "run", objective))
    folder = tmp_path / "run" / "encoder"
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "out.pt")], check=True, cwd=tmp_path)
    tokens_1LW = torch.load(tmp_path / "out.pt", weights_only=True)
    encoder = load_encoder(folder)
    image = Image.new("RGB", (20, 16), (200, 30, 90))
    with torch.no_grad():
        pixels = encoder.processor(images=image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(encoder.vision(pixel_values=pixels).last_hidden_state, tokens_1LW, atol=2e-2, rtol=0)
    assert set(load_file(folder / "model.safetensors")) == {
        f"vision_model.{name}" for name in encoder.vision.state_dict() if "position_ids" not in name
    }
    assert encoder.embedding_dim == (16 if objective == "clip" else 32)
    features = encoder.encode_images([image, noise_image(3)])
    texts = encoder.encode_texts(["a", "b", "c"])
    assert features.shape == (2, texts.shape[1])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


def test_joint_space_has_the_dimensions_of_the_text_transform(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """The transform in the encoder folder is the one fitted on the store, and evaluation applies it."""
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path / "run")
    pretrain(replace(settings, text_transform=TextTransformSettings(kind="whiten", dimensions=8, shrinkage=0.1)))
    encoder = load_encoder(tmp_path / "run" / "encoder")
    store = EmbeddingStore(tmp_path / "run" / "embeddings")
    (saved,) = (store.folder / "transforms").glob("*.safetensors")
    assert saved.stem in store.manifest["transforms"]
    assert all(torch.equal(tensor, load_file(saved)[name]) for name, tensor in encoder.text_transform.state_dict().items())
    assert encoder.encode_images([noise_image(3)]).shape == (1, encoder.embedding_dim) == (1, 8)
    row = store.match("webdataset-00000", ["webdataset/000000000#0"], text_hashes(["picture number 000000000"]))
    expected = encoder.text_transform(torch.from_numpy(store.rows(row)))
    np.testing.assert_allclose(encoder.encode_texts(["picture number 000000000"]), expected, atol=1e-3)


def test_encoder_whose_text_encoder_changed_is_refused(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_llm, tmp_path / "llm")
    pretrain(tiny_pretrain(pairs, tmp_path / "llm", tmp_path / "run"))
    encoder = load_encoder(tmp_path / "run" / "encoder")
    with (tmp_path / "llm" / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="was aligned to the text encoder"):
        encoder.encode_texts(["a"])


def test_lift_and_clip_start_from_the_same_image_encoder(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path)
    lift = build_lift(settings, TextTransform("none", 32))
    clip = build_clip(settings, clip_tokenizer(settings.clip_text, ["a picture"]))
    other = build_lift(replace(settings, seed=1), TextTransform("none", 32))
    weights = lift.vision.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in clip.vision.state_dict().items())
    assert not torch.equal(weights["embeddings.class_embedding"], other.vision.state_dict()["embeddings.class_embedding"])


def test_caption_without_embedding_leaves_the_order_alone(pairs: Path, tiny_llm: Path, tmp_path: Path, monkeypatch) -> None:
    """CLIP drops nothing and LIFT one caption: both still see the same images at every step."""
    keys = {}
    match = EmbeddingStore.match

    def match_all_but_one(store: EmbeddingStore, shard: str, keys: pa.Array, hashes: np.ndarray) -> np.ndarray:
        return np.where(["000000003#" in key for key in keys.to_pylist()], -1, match(store, shard, keys, hashes))

    monkeypatch.setattr(EmbeddingStore, "match", match_all_but_one)
    for objective in ("contrastive", "clip"):
        run = tmp_path / objective
        pretrain(replace(tiny_pretrain(pairs, tiny_llm, run, objective), log_every=1, max_drop_fraction=0.1))
        keys[objective] = [json.loads(line)["keys"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert keys["contrastive"] == keys["clip"]
    finished = json.loads((tmp_path / "contrastive" / "finished.json").read_text())
    assert finished["dropped"] == {"no embedding of a caption": 1} and finished["samples"] == 24


def test_run_of_other_data_is_refused(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path / "run", "clip")
    pretrain(settings)
    written = (tmp_path / "run" / "environment.json").stat().st_mtime_ns
    pretrain(settings)
    assert (tmp_path / "run" / "environment.json").stat().st_mtime_ns == written
    write_tar(pairs / "00002.tar", {"new.png": encoded(noise_image(9)), "new.txt": b"a new picture"})
    with pytest.raises(UserError, match="holds a run with samples_sha256="):
        pretrain(settings)


def test_failed_start_does_not_bind_the_folder(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    settings = tiny_pretrain(pairs, tiny_llm, tmp_path / "run", "clip")
    with pytest.raises(UserError, match="no such file"):
        pretrain(replace(settings, data=[SourceSettings(kind="webdataset", path=tmp_path / "typo")]))
    pretrain(settings)


def test_tokenizer_that_does_not_end_captions_is_refused(tiny_llm: Path) -> None:
    with pytest.raises(UserError, match="does not end a caption"):
        clip_tokenizer(ClipTextSettings(tokenizer=tiny_llm), [])


def test_official_data_and_embeddings_train_without_their_text_encoder(shared: Path, tmp_path: Path) -> None:
    """The official layout end to end: the loader there drops images over 50,000 bytes, here they count."""
    layout = shared / "fixtures" / "official_layout"
    expected = json.loads((layout / "expected.json").read_text())
    (tmp_path / "captions").mkdir()
    for folder in sorted((layout / "images").iterdir()):
        keys = [path.stem for path in sorted(folder.iterdir())]
        table = pa.table({"key": keys, "re_caption": [f"long {key}" for key in keys], "extension": ["jpg"] * len(keys)})
        pq.write_table(table, tmp_path / "captions" / f"{folder.name}.parquet")
    encoder = TextEncoderSettings(kind="nv_embed", path="not/on-this-machine")
    embeddings = layout / "caption_embeddings"
    import_embeddings(
        ImportEmbeddingsSettings(
            kind="official_parquet", path=embeddings, out=tmp_path / "store", text_encoder=encoder, max_drop_fraction=0.2
        )
    )
    source = SourceSettings(kind="official_lift", path=str(tmp_path / "captions"), images=str(layout / "images"))
    settings = PretrainSettings(
        data=[source], out=tmp_path / "run", embeddings=tmp_path / "store", text_encoder=encoder, captions="first",
        vision=VisionSettings(image_size=32, patch_size=16, width=32, layers=1, heads=2), batch_size=4, workers=0,
        max_drop_fraction=0.3,
    )  # fmt: skip
    pretrain(settings)
    finished = json.loads((settings.out / "finished.json").read_text())
    assert finished["dropped"] == {"no embedding of a caption": 2, "undecodable image": 2}
    dropped = {json.loads(line)["key"].rpartition("/")[2] for line in (settings.out / "dropped.jsonl").read_text().splitlines()}
    skipped = {name for name, rule in expected["rule"].items() if rule.startswith("skip") and "50000" not in rule}
    assert {f"{key}.jpg" for key in dropped} == skipped
    with pytest.raises(UserError, match=r"made with \{'kind': 'nv_embed'"):
        pretrain(replace(settings, out=tmp_path / "other", text_encoder=replace(encoder, kind="causal_lm")))
