"""Fixed linear maps of the text embeddings (centring, PCA, whitening), fitted once on a sample of a store and kept in it.

Text encoders put captions that differ in word order almost on top of each other; a map of the fixed side can spread them at
no training cost. The model takes the map over as buffers, so that training and evaluation use the same. Off by default.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lift.common.errors import UserError
from lift.common.files import atomic_file, sha256_file
from lift.settings import TextTransformSettings, TransformSettings
from lift.store import EmbeddingStore

TransformKind = Literal["none", "centre", "pca", "whiten"]
CHUNK = 4096
"""Rows turned to float64 at a time."""
SINGULAR = 1e-10
"""Share of the largest eigenvalue below which a direction of a sample counts as empty."""


class TextTransform(nn.Module):
    """normalise(matrix^T (normalise(x) - mean)); with kind "none" only normalise(x). Has buffers, no parameters.

    Maps [N, dimension] of any float type to float32 [N, output_dimension]: rows are orthonormal directions of largest variance
    for `pca`, the same divided by their standard deviation for `whiten`.
    """

    mean_D: Tensor
    matrix_DK: Tensor

    def __init__(self, kind: TransformKind, dimension: int, output_dimension: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.dimension = dimension
        self.output_dimension = output_dimension or dimension
        if kind != "none":
            self.register_buffer("mean_D", torch.zeros(dimension))
        if kind in ("pca", "whiten"):
            self.register_buffer("matrix_DK", torch.eye(dimension, self.output_dimension))

    @torch.no_grad()
    def fit(self, embeddings_ND: np.ndarray, shrinkage: float) -> None:
        """Fits on raw embeddings, in float64. `shrinkage` is added to the eigenvalues as a share of their mean (whiten).

        Raises:
            UserError: whitening without shrinkage of a sample that does not span the dimensions kept.
        """
        if self.kind == "none":
            return
        mean_D, covariance_DD = _moments(embeddings_ND)
        self.mean_D.copy_(mean_D)
        if self.kind == "centre":
            return
        eigenvalues_D, vectors_DD = (values.flip(-1) for values in torch.linalg.eigh(covariance_DD))
        variance_K = eigenvalues_D[: self.output_dimension].clamp(min=0) + shrinkage * eigenvalues_D.mean()
        # the sign of an eigenvector is the solver's whim
        vectors_DK = vectors_DD[:, : self.output_dimension]
        vectors_DK = vectors_DK * vectors_DK.gather(0, vectors_DK.abs().argmax(0, keepdim=True)).sign()
        if self.kind == "whiten":
            if variance_K[-1] <= SINGULAR * variance_K[0]:
                raise UserError(
                    f"text_transform: {len(embeddings_ND)} sampled embeddings do not span {self.output_dimension} dimensions. "
                    "Give a shrinkage above 0, fewer dimensions, or a larger sample."
                )
            vectors_DK = vectors_DK * variance_K.rsqrt()
        self.matrix_DK.copy_(vectors_DK)

    def forward(self, embeddings_ND: Tensor) -> Tensor:
        return F.normalize(self._mapped(F.normalize(embeddings_ND.float(), dim=-1)), dim=-1)

    def unnormalised(self, embeddings_ND: Tensor) -> Tensor:
        """Before the last normalisation; with kind "none" as they are, which the official SugarCrepe script compares."""
        embeddings_ND = embeddings_ND.float()
        return embeddings_ND if self.kind == "none" else self._mapped(F.normalize(embeddings_ND, dim=-1))

    def _mapped(self, x_ND: Tensor) -> Tensor:
        x_NK = x_ND if self.kind == "none" else x_ND - self.mean_D
        return x_NK @ self.matrix_DK if self.kind in ("pca", "whiten") else x_NK


def _moments(embeddings_ND: np.ndarray) -> tuple[Tensor, Tensor]:
    """float64 mean [D] and covariance [D, D] of the normalised rows."""
    dimension = embeddings_ND.shape[1]
    sum_D, product_DD = torch.zeros(dimension, dtype=torch.float64), torch.zeros(dimension, dimension, dtype=torch.float64)
    for start in range(0, len(embeddings_ND), CHUNK):
        x_ND = F.normalize(torch.from_numpy(embeddings_ND[start : start + CHUNK]).double(), dim=-1)
        sum_D += x_ND.sum(0)
        product_DD.addmm_(x_ND.T, x_ND)
    mean_D = sum_D / len(embeddings_ND)
    return mean_D, product_DD / len(embeddings_ND) - torch.outer(mean_D, mean_D)


def transform_name(settings: TextTransformSettings, seed: int) -> str:
    """As in whiten-128-0.01-sample100000-seed0; the settings that the fit depends on, so that none is taken for another."""
    parts = [settings.kind, settings.dimensions, settings.shrinkage if settings.kind == "whiten" else None]
    return "-".join(str(part) for part in [*parts, f"sample{settings.sample}", f"seed{seed}"] if part is not None)


def fitted_transform(store: EmbeddingStore, settings: TextTransformSettings, seed: int) -> TextTransform:
    """The transform saved in the store, or a new one, fitted on a sample of the store drawn by `seed` and saved there.

    Raises:
        UserError: more dimensions than the embeddings have, an empty store, a saved file that is not what the manifest states.
    """
    if (settings.dimensions or 0) > store.dimension:
        raise UserError(f"text_transform.dimensions {settings.dimensions}: {store.folder} has {store.dimension} dimensions.")
    transform = TextTransform(settings.kind, store.dimension, settings.dimensions)
    if settings.kind == "none":
        return transform
    name = transform_name(settings, seed)
    path = store.folder / "transforms" / f"{name}.safetensors"
    entry = store.manifest["transforms"].get(name)
    if entry is not None and path.is_file():
        if sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path}: not the file that the store's manifest states. Delete it; it is then fitted again.")
        try:
            transform.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: not a {settings.kind} transform of this store: {error}. Delete it.") from error
        return transform
    if not len(store):
        raise UserError(f"{store.folder}: no embeddings to fit a text transform on.")
    sample_ND = store.sample(settings.sample, seed)
    transform.fit(sample_ND, settings.shrinkage)
    with atomic_file(path) as temporary:
        save_file(transform.state_dict(), temporary, metadata={"format": "pt"})
    details: dict[str, Any] = {"kind": settings.kind, "dimensions": transform.output_dimension}
    details |= {"shrinkage": settings.shrinkage} if settings.kind == "whiten" else {}
    store.record_transform(name, {**details, "rows": len(sample_ND), "seed": seed, "sha256": sha256_file(path)})
    return transform


def fit_transform(settings: TransformSettings) -> None:
    """`lift transform`."""
    store = EmbeddingStore(settings.store)
    transform = fitted_transform(store, settings, settings.seed)
    name = transform_name(settings, settings.seed)
    print(f"{store.folder / 'transforms' / name}.safetensors: {transform.dimension} to {transform.output_dimension} dimensions")
