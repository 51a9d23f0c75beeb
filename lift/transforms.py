"""Fixed linear maps of the text embeddings (centring, PCA whitening), fitted once on a store and kept with the model.

Small text encoders put captions that differ in word order almost on top of each other; a map of the fixed side can spread
them at no training cost. Off by default, as in the paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TransformKind = Literal["none", "centre", "whiten"]


class TextTransform(nn.Module):
    """normalise(matrix^T (normalise(x) - mean)); with kind "none" only normalise(x). Has buffers, no parameters."""

    mean_D: Tensor
    matrix_DD: Tensor

    def __init__(self, kind: TransformKind, dimension: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "none":
            self.register_buffer("mean_D", torch.zeros(dimension))
        if kind == "whiten":
            self.register_buffer("matrix_DD", torch.eye(dimension))

    @torch.no_grad()
    def fit(self, embeddings_ND: Tensor, shrinkage: float) -> None:
        """Fits on raw embeddings, in float64. `shrinkage` is added to the eigenvalues as a share of their mean."""
        if self.kind == "none":
            return
        x_ND = F.normalize(embeddings_ND.double(), dim=-1)
        self.mean_D.copy_(x_ND.mean(0))
        if self.kind == "whiten":
            centred_ND = x_ND - x_ND.mean(0)
            eigenvalues_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(x_ND))
            scale_D = (eigenvalues_D.clamp(min=0) + shrinkage * eigenvalues_D.mean()).rsqrt()
            self.matrix_DD.copy_(vectors_DD * scale_D)

    def forward(self, embeddings_ND: Tensor) -> Tensor:
        x_ND = F.normalize(embeddings_ND, dim=-1)
        if self.kind != "none":
            x_ND = x_ND - self.mean_D
        if self.kind == "whiten":
            x_ND = x_ND @ self.matrix_DD
        return F.normalize(x_ND, dim=-1)
