"""`lift encode` on image files: rows and their names, protocols, damaged images; and the export of a trained run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import encoded, noise_image
from tiny_official import DIM, lift_state, run_import, save, tiny_run

from lift.__main__ import COMMANDS
from lift.common.cli import run_command
from lift.common.errors import UserError
from lift.common.files import sha256_file
from lift.encode import encode
from lift.encoder import load_encoder
from lift.export import export
from lift.settings import EncodeSettings, ExportSettings, TextTransformSettings
from lift.train import pretrain


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "encoder")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for seed, name in enumerate(("z.png", "a.PNG", "b/c.jpg", "b.webp")):
        kind = {"jpg": "jpeg", "png": "png", "webp": "webp"}[name.rpartition(".")[2].lower()]
        (folder / name).write_bytes(encoded(noise_image(seed, (40 + seed, 30)), kind))
    (folder / "order.json").write_text("[]")
    return folder


def test_rows_follow_the_sorted_paths_and_the_json_names_them(encoder: Path, images: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    settings = EncodeSettings(folder=encoder, images=images, out=tmp_path / "emb.npy", batch_size=3)
    encode(settings)
    rows_ND, about = np.load(tmp_path / "emb.npy"), json.loads((tmp_path / "emb.json").read_text())
    assert about["images"] == ["a.PNG", "b.webp", "b/c.jpg", "z.png"] and about["undecodable"] == []
    assert about["sha256"] == sha256_file(tmp_path / "emb.npy") and about["normalised"] is True
    assert rows_ND.dtype == np.float32 and rows_ND.shape == (4, DIM)
    model = load_encoder(encoder)
    for name, row_D in zip(about["images"], rows_ND, strict=True):
        np.testing.assert_allclose(row_D, model.encode_images([Image.open(images / name)])[0], atol=1e-6)
    encode(replace(settings, out=tmp_path / "raw.npy", raw=True))
    raw_ND = np.load(tmp_path / "raw.npy")
    norm_N1 = np.linalg.norm(raw_ND, axis=1, keepdims=True)
    assert (norm_N1 > 2).all()
    np.testing.assert_allclose(raw_ND / norm_N1, rows_ND, atol=1e-6)
    assert "1 files there are no images by their suffix" in capsys.readouterr().out


def test_damaged_image_stops_by_name_or_gives_a_row_of_nan(encoder: Path, images: Path, tmp_path: Path) -> None:
    whole = (images / "b" / "c.jpg").read_bytes()
    (images / "b" / "c.jpg").write_bytes(whole[: len(whole) // 2])
    settings = EncodeSettings(folder=encoder, images=images, out=tmp_path / "emb.npy")
    with pytest.raises(UserError, match=r"b/c\.jpg: cannot be decoded"):
        encode(settings)
    assert not list(tmp_path.glob("emb*"))
    encode(replace(settings, allow_undecodable=True, batch_size=1))
    rows_ND = np.load(tmp_path / "emb.npy")
    assert np.isnan(rows_ND).all(axis=1).tolist() == [False, False, True, False]
    assert np.isfinite(rows_ND[[0, 1, 3]]).all()
    assert json.loads((tmp_path / "emb.json").read_text())["undecodable"] == ["b/c.jpg"]


def test_official_protocol_needs_an_encoder_of_224_pixels(encoder: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="crops 224 pixels, but this encoder sees 16"):
        encode(EncodeSettings(folder=encoder, images=images, out=tmp_path / "emb.npy", protocol="official"))


def test_folder_without_images_is_refused(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="expected image files"):
        encode(EncodeSettings(folder=encoder, images=tmp_path / "none", out=tmp_path / "emb.npy"))
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        EncodeSettings(folder=encoder, images=tmp_path, out=tmp_path / "emb.bin")


def test_official_values_by_the_command_line(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lift import` and `lift encode` as a user calls them, on the official checkpoint and image files."""
    official = shared / "fixtures" / "official_lift_tiny"
    folder = str(tmp_path / "encoder")
    config = str(official / "LIFT-tiny.json")
    call = ["import", str(official / "epoch_1.pt"), "--out", folder, "--model_config", config]
    assert run_command("lift", COMMANDS, call) == 0
    common = ["--images", str(official / "images"), "--protocol", "official"]
    assert run_command("lift", COMMANDS, ["encode", "--raw", folder, *common, "--out", str(tmp_path / "emb.npy")]) == 0
    assert run_command("lift", COMMANDS, ["encode", folder, *common, "--out", str(tmp_path / "norm.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), np.load(official / "emb.npy"), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.load(tmp_path / "norm.npy"), np.load(official / "emb_norm.npy"), atol=1e-5, rtol=0)
    order = json.loads((official / "images" / "order.json").read_text())
    names = json.loads((tmp_path / "norm.json").read_text())["images"]
    assert [name.removesuffix(".png") for name in names] == order
    assert run_command("lift", COMMANDS, ["encode", folder, "--out", str(tmp_path / "x.npy")]) == 2
    assert "--images is required" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["contrastive", "cosine"])
def test_run_exported_officially_and_imported_gives_identical_embeddings(
    pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str
) -> None:
    settings = tiny_run(pairs, tiny_llm, tmp_path / "run", objective=objective)
    pretrain(settings)
    export(ExportSettings(run=tmp_path / "run", out=tmp_path / "official.pt", format="official"))
    whole = torch.load(tmp_path / "official.pt", weights_only=True)
    assert (whole["epoch"], whole["name"]) == (0, "run")
    again = load_encoder(run_import(tmp_path / "official.pt", tmp_path / "again", head_width=8))
    encoder = load_encoder(tmp_path / "run" / "encoder")
    images = [noise_image(seed) for seed in range(3)]
    assert np.array_equal(again.encode_images(images), encoder.encode_images(images))
    assert again.config["objective"] == objective


def test_what_the_official_code_would_read_differently_is_not_exported(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    whitened = tiny_run(pairs, tiny_llm, tmp_path / "whiten", text_transform=TextTransformSettings(kind="whiten"))
    clip = tiny_run(pairs, tiny_llm, tmp_path / "clip", objective="clip")
    sigmoid = tiny_run(pairs, tiny_llm, tmp_path / "sigmoid", objective="sigmoid")
    cases = (
        (whitened, r"whiten(/encoder)?: was aligned.* 'whiten'"),
        (clip, "takes it at the largest id"),
        (sigmoid, "the sigmoid objective"),
    )
    for settings, message in cases:
        pretrain(settings)
        for folder in (settings.out, settings.out / "encoder"):
            with pytest.raises(UserError, match=message):
                export(ExportSettings(run=folder, out=tmp_path / "official.pt", format="official"))
    assert not (tmp_path / "official.pt").exists()
    with pytest.raises(UserError, match="is an encoder folder already"):
        export(ExportSettings(run=whitened.out / "encoder", out=tmp_path / "folder"))
