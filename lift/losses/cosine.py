"""Cosine loss: image and text features of this process come in, 1 - cosine of the positive pairs goes out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lift.losses.gather import world_size


def cosine_loss(image_BD: Tensor, text_BD: Tensor, valid_B: Tensor) -> Tensor:
    """Mean of 1 - cosine over the positive pairs (LIFT, arXiv 2506.04209, cosine variant); there are no negatives.

    Args:
        image_BD, text_BD: L2-normalised features, any floating dtype; the sum is taken in float32 at least.
        valid_B: bool; False for rows that stand in for dropped samples.
    """
    precision = torch.promote_types(image_BD.dtype, torch.float32)
    image_BD, text_BD = (rows_BD.masked_fill(~valid_B[:, None], 0).to(precision) for rows_BD in (image_BD, text_BD))
    count = valid_B.sum()
    if world_size() > 1:
        dist.all_reduce(count)
    return ((1 - (image_BD * text_BD).sum(-1)) * valid_B).sum() * world_size() / count.clamp(min=1)
