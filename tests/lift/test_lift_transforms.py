"""Text-side transforms: their arithmetic, and that they are fitted once and kept in the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lift.__main__ import COMMANDS
from lift.common.cli import run_command
from lift.common.errors import UserError
from lift.settings import TextTransformSettings
from lift.store import EmbeddingStore, StoreWriter
from lift.transforms import TextTransform, fitted_transform


def data(rows: int = 5000) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(rows, 6)) * [5, 3, 2, 1, 1, 1] + 3).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    writer = StoreWriter(tmp_path / "store", {"kind": "test"}, 6)
    values = data(500)
    writer.write_shard("a", [str(i) for i in range(500)], [""] * 500, values)
    writer.finish(["a"])
    return EmbeddingStore(tmp_path / "store")


def fitted(kind: str, dimensions: int | None = None, shrinkage: float = 0.0) -> TextTransform:
    transform = TextTransform(kind, 6, dimensions)  # type: ignore[arg-type]
    transform.fit(data(), shrinkage)
    return transform


def covariance(transform: TextTransform) -> torch.Tensor:
    """Of the fitted sample, before the last normalisation."""
    x_ND = (F.normalize(torch.from_numpy(data()).double(), dim=-1) - transform.mean_D) @ transform.matrix_DK.double()
    assert x_ND.mean(0).abs().max() < 1e-6
    return x_ND.T @ x_ND / len(x_ND)


def test_none_and_centre() -> None:
    x_ND = torch.from_numpy(data())
    unit_ND = F.normalize(x_ND, dim=-1)
    torch.testing.assert_close(fitted("none")(x_ND), unit_ND)
    centre = fitted("centre")
    torch.testing.assert_close(centre.mean_D, unit_ND.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(centre(x_ND), F.normalize(unit_ND - unit_ND.mean(0), dim=-1))


@pytest.mark.parametrize("dimensions", [None, 4])
def test_whitened_covariance_is_the_identity(dimensions: int | None) -> None:
    torch.testing.assert_close(covariance(fitted("whiten", dimensions)), torch.eye(dimensions or 6).double(), atol=1e-4, rtol=0)


def test_pca_keeps_the_directions_of_largest_variance() -> None:
    everything = fitted("pca", 6)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(F.normalize(torch.from_numpy(data()).double(), dim=-1).T, correction=0)).flip(
        0
    )
    torch.testing.assert_close(covariance(everything), torch.diag(eigenvalues), atol=1e-6, rtol=0)
    two = fitted("pca", 2)
    torch.testing.assert_close(two.matrix_DK, everything.matrix_DK[:, :2])
    assert (two.matrix_DK.gather(0, two.matrix_DK.abs().argmax(0, keepdim=True)) > 0).all()
    x_ND = torch.from_numpy(data())
    torch.testing.assert_close(everything(x_ND) @ everything(x_ND[:9]).T, fitted("centre")(x_ND) @ fitted("centre")(x_ND[:9]).T)


def test_shrinkage_lies_between_whitening_and_pca() -> None:
    eigenvalues = torch.diag(covariance(fitted("pca", 6)))
    expected = eigenvalues / (eigenvalues + 0.5 * eigenvalues.mean())
    torch.testing.assert_close(covariance(fitted("whiten", shrinkage=0.5)), torch.diag(expected), atol=1e-5, rtol=0)
    x_ND = torch.from_numpy(data())
    torch.testing.assert_close(fitted("whiten", shrinkage=1e6)(x_ND), fitted("pca", 6)(x_ND), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "dimensions"), [("none", None), ("centre", None), ("pca", 3), ("whiten", 3), ("whiten", None)]
)
def test_what_comes_out_is_of_length_one_whatever_float_goes_in(kind: str, dimensions: int | None) -> None:
    transform = fitted(kind, dimensions, 0.01)
    out_NK = transform(torch.from_numpy(data()).half())
    assert out_NK.shape == (5000, dimensions or 6) and out_NK.dtype == torch.float32
    torch.testing.assert_close(out_NK.norm(dim=-1), torch.ones(5000))


def test_transform_is_fitted_once_and_loaded_from_the_store(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TextTransformSettings(kind="whiten", dimensions=4, shrinkage=0.1, sample=300)
    first = fitted_transform(store, settings, seed=7)
    name = "whiten-4-0.1-sample300-seed7"
    entry = EmbeddingStore(store.folder).manifest["transforms"][name]
    assert entry | {"sha256": ""} == {
        "kind": "whiten", "dimensions": 4, "shrinkage": 0.1, "rows": 300, "seed": 7, "sha256": "",
    }  # fmt: skip
    other = fitted_transform(store, settings, seed=8)
    assert not torch.equal(first.matrix_DK, other.matrix_DK)
    bytes_before = (store.folder / "transforms" / f"{name}.safetensors").read_bytes()
    (store.folder / "transforms" / f"{name}.safetensors").unlink()
    fitted_transform(EmbeddingStore(store.folder), settings, seed=7)
    assert (store.folder / "transforms" / f"{name}.safetensors").read_bytes() == bytes_before
    monkeypatch.setattr(TextTransform, "fit", lambda *_: pytest.fail("fitted again"))
    again = fitted_transform(EmbeddingStore(store.folder), settings, seed=7)
    assert torch.equal(first.matrix_DK, again.matrix_DK) and torch.equal(first.mean_D, again.mean_D)
    with (store.folder / "transforms" / f"{name}.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(UserError, match="not the file that the store's manifest states"):
        fitted_transform(EmbeddingStore(store.folder), settings, seed=7)


def test_none_leaves_the_store_alone(store: EmbeddingStore) -> None:
    before = (store.folder / "manifest.json").read_bytes()
    fitted_transform(store, TextTransformSettings(), seed=0)
    assert (store.folder / "manifest.json").read_bytes() == before and not (store.folder / "transforms").exists()


def test_impossible_settings_are_refused(store: EmbeddingStore) -> None:
    with pytest.raises(UserError, match="has 6 dimensions"):
        fitted_transform(store, TextTransformSettings(kind="pca", dimensions=7), seed=0)
    with pytest.raises(UserError, match="3 sampled embeddings do not span 6 dimensions"):
        fitted_transform(store, TextTransformSettings(kind="whiten", shrinkage=0.0, sample=3), seed=0)
    with pytest.raises(ValueError, match="pca needs"):
        TextTransformSettings(kind="pca")
    with pytest.raises(ValueError, match="centre keeps all"):
        TextTransformSettings(kind="centre", dimensions=3)


def test_command(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(store.folder), "--kind", "pca", "--dimensions", "2", "--seed", "3"]
    assert run_command("lift", COMMANDS, ["transform", *arguments]) == 0
    assert "pca-2-sample100000-seed3.safetensors: 6 to 2 dimensions" in capsys.readouterr().out
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["transforms"]["pca-2-sample100000-seed3"]["rows"] == 500
    assert run_command("lift", COMMANDS, ["transform", str(store.folder)]) == 2
    assert "choose centre, pca or whiten" in capsys.readouterr().err
