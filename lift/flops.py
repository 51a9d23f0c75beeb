"""Floating-point operations of one training sample, by formula, and what the device can do: from these comes MFU.

Counted are matrix products and attention of the image encoder, its head, and the text tower of the CLIP baseline, 2 for each
multiply-add, backward twice the forward (model FLOPs: gradient checkpointing's second forward is not counted). Not counted
are the loss, normalisations and activations. Against PyTorch's counter on the official models: see `tests/lift`.
"""

from __future__ import annotations

import time

import torch

from lift.settings import ClipTextSettings, VisionSettings

BACKWARD_AND_FORWARD = 3


def training_flops(vision: VisionSettings, embedding_dim: int, clip_text: ClipTextSettings | None, tokens: int = 0) -> float:
    """FLOPs of forward and backward of one image-caption pair.

    Args:
        embedding_dim: dimension of the joint space.
        clip_text: the text tower, when it is trained (CLIP); then `tokens` is the length of a caption.
    """
    patches = (vision.image_size // vision.patch_size) ** 2
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.width
    forward = embedding + _transformer(patches + 1, vision.width, vision.layers, vision.mlp_ratio)
    if clip_text is None:
        forward += 2 * (vision.width + embedding_dim) * embedding_dim
    else:
        forward += 2 * vision.width * embedding_dim + 2 * clip_text.width * embedding_dim
        forward += _transformer(tokens, clip_text.width, clip_text.layers, 4)
    return BACKWARD_AND_FORWARD * forward - embedding  # pixels need no gradient


def _transformer(tokens: int, width: int, layers: int, mlp_ratio: float) -> float:
    projections = 2 * tokens * width**2 * (4 + 2 * mlp_ratio)
    attention = 2 * 2 * tokens**2 * width
    return layers * (projections + attention)


def matrix_peak(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large matrix product on `device`, the best of several: the peak that MFU is a share of."""
    size, times = (8192, 10) if device.type == "cuda" else (2048, 5)
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    best = 0.0
    for _ in range(times):
        _synchronise(device)
        start = time.perf_counter()
        a @ b
        _synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
