"""Contrastive and cosine losses over the batch of all processes, for a fixed or a trained text side.

Shapes: B samples of this process, G = B x processes, D the joint dimension. Each process returns the loss of its own rows,
scaled so that the average over processes (what DDP does to gradients) is the loss of the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, log_scale_1: Tensor, valid_B: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP, section 2.3; LIFT, contrastive variant): mean of image-to-text and text-to-image cross entropy.

    Args:
        image_BD, text_BD: L2-normalised features; the text side may have no gradient (LIFT) or have one (CLIP).
        log_scale_1: logarithm of the inverse temperature.
        valid_B: False for rows that stand in for dropped samples; they are neither queries nor negatives.
    """
    image_GD, text_GD, valid_G = _gather(image_BD), _gather(text_BD), _gather(valid_B)
    own_B = torch.arange(len(image_BD), device=image_BD.device) + _rank() * len(image_BD)
    scale = log_scale_1.exp()
    image_to_text_BG = (scale * image_BD @ text_GD.T).masked_fill(~valid_G, -torch.inf)
    text_to_image_BG = (scale * text_BD @ image_GD.T).masked_fill(~valid_G, -torch.inf)
    per_sample_B = torch.zeros_like(image_to_text_BG[:, 0])
    rows = valid_B.nonzero().squeeze(1)
    for logits_BG in (image_to_text_BG, text_to_image_BG):
        per_sample_B = per_sample_B.index_add(0, rows, F.cross_entropy(logits_BG[rows], own_B[rows], reduction="none"))
    return _mean_over_processes(per_sample_B / 2, valid_G)


def cosine_loss(image_BD: Tensor, text_BD: Tensor, valid_B: Tensor) -> Tensor:
    """1 - cosine of the positive pairs (LIFT, cosine variant); needs no negatives. Arguments as in `contrastive_loss`."""
    per_sample_B = (1 - (image_BD * text_BD).sum(-1)) * valid_B
    return _mean_over_processes(per_sample_B, _gather(valid_B))


def _mean_over_processes(per_sample_B: Tensor, valid_G: Tensor) -> Tensor:
    return per_sample_B.sum() * _world() / valid_G.sum().clamp(min=1)


def _gather(rows_BX: Tensor) -> Tensor:
    """Rows of all processes in rank order; gradients flow back to the process that owns the row."""
    if _world() == 1:
        return rows_BX
    if rows_BX.requires_grad:
        return torch.cat(dist_nn.all_gather(rows_BX.contiguous()))
    gathered = [torch.empty_like(rows_BX) for _ in range(_world())]
    dist.all_gather(gathered, rows_BX.contiguous())
    return torch.cat(gathered)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
