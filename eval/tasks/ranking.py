"""Ranks of the right items in a gallery, with memory bounded by a chunk of the similarity matrix."""

from __future__ import annotations

from operator import ge, gt
from typing import NamedTuple

import numpy as np
import torch

CHUNK_ELEMENTS = 1 << 25
"""Similarities held at a time: 128 MiB of float32."""


class Ranks(NamedTuple):
    rank_N: np.ndarray
    """int64, from 0: wrong gallery items at least as near as the nearest right one. A wrong item that ties ranks before it, so
    that a collapsed encoder does not score."""
    tie_N: np.ndarray
    """bool: a wrong item is exactly as near as the nearest right one."""
    right_N: np.ndarray
    """float32: similarity of the nearest right item."""
    wrong_N: np.ndarray
    """float32: similarity of the nearest wrong item; -inf when all are right."""


@torch.inference_mode()
def ranks(
    query_ND: np.ndarray,
    gallery_MD: np.ndarray,
    right: list[np.ndarray],
    device: torch.device | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Ranks:
    """Where the right items of each query come in the order of similarity.

    Args:
        query_ND, gallery_MD: float32; the similarity is their inner product.
        right: for each query the numbers of its right gallery items, distinct, at least one.
    Raises:
        ValueError: a query without a right item, or features that are not finite.
    """
    if not (np.isfinite(query_ND).all() and np.isfinite(gallery_MD).all()):
        raise ValueError("expected finite features")
    if len(right) != len(query_ND) or not all(map(len, right)):
        raise ValueError("expected a right gallery item for every query")
    gallery = torch.from_numpy(gallery_MD).to(device)
    size = max(1, chunk_elements // len(gallery_MD))
    parts = []
    for start in range(0, len(query_ND), size):
        query_BD = torch.from_numpy(query_ND[start : start + size]).to(device)
        parts.append(_chunk_ranks(query_BD @ gallery.T, right[start : start + size]))
    return Ranks(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _chunk_ranks(similarity_BM: torch.Tensor, right: list[np.ndarray]) -> Ranks:
    device = similarity_BM.device
    counts_B = torch.tensor([len(numbers) for numbers in right], device=device)
    row_P = torch.repeat_interleave(torch.arange(len(right), device=device), counts_B)
    column_P = torch.from_numpy(np.concatenate(right).astype(np.int64)).to(device)
    right_P = similarity_BM[row_P, column_P]
    best_B = torch.full((len(right),), -torch.inf, device=device).scatter_reduce(0, row_P, right_P, "amax")
    similarity_BM[row_P, column_P] = -torch.inf  # what is left are wrong items
    at_least_B, above_B = _counts(similarity_BM, best_B)
    return Ranks(at_least_B, at_least_B > above_B, best_B.cpu().numpy(), similarity_BM.amax(dim=1).cpu().numpy())


def _counts(similarity_BM: torch.Tensor, limit_B: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B]: how many of each row are at least, and how many are above, its limit."""
    if similarity_BM.device.type != "cpu":
        limit_B1 = limit_B[:, None]
        counts = (similarity_BM >= limit_B1).sum(dim=1), (similarity_BM > limit_B1).sum(dim=1)
        return counts[0].cpu().numpy(), counts[1].cpu().numpy()
    # NumPy counts a row of booleans 20 times as fast as torch, which widens each to 8 bytes first
    rows = list(zip(similarity_BM.numpy(), limit_B.numpy(), strict=True))
    at_least, above = ([np.count_nonzero(compare(row_M, limit)) for row_M, limit in rows] for compare in (ge, gt))
    return np.array(at_least, np.int64), np.array(above, np.int64)
