"""Sigmoid loss (SigLIP) for a fixed text side, one tile of logits at a time.

Image features of this process and text features of all come in, a scalar goes out. Pairs are judged one by one, so that nothing
but the gathered text crosses between processes, and the gradient is made in the forward pass: each tile is computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lift.losses.gather import GatheredText
from lift.losses.tiles import DEFAULT_TILE, Negatives, TiledLogits, add_image_gradient, without_autocast


def sigmoid_loss(
    image_BD: Tensor,
    text: GatheredText,
    log_scale_1: Tensor,
    bias_1: Tensor,
    negatives: Negatives | None = None,
    tile: int = DEFAULT_TILE,
) -> Tensor:
    """Sum over all pairs of -log sigmoid(z (scale cosine + bias)), z = 1 for an image's own text and -1 for others, per valid
    image (SigLIP, arXiv 2303.15343, section 3). There the scale starts at 10 and the bias at -10.

    Value and gradient belong to this process's images, each against all texts. The text gets no gradient.

    Args:
        bias_1: one element.
        negatives: more pairs with z = -1.
        image_BD, text, log_scale_1, tile: as for `contrastive_loss`.

    Raises:
        ValueError: the shapes do not fit.
    """
    loss: Tensor = _Sigmoid.apply(image_BD, log_scale_1, bias_1, text, negatives, tile)  # type: ignore[no-untyped-call]
    return loss


class _Sigmoid(torch.autograd.Function):
    """With logits L: a negative pair costs softplus(L), a positive softplus(L) - L; the gradient for L is sigmoid(L) - I."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        image_BD: Tensor,
        log_scale_1: Tensor,
        bias_1: Tensor,
        text: GatheredText,
        negatives: Negatives | None,
        tile: int,
    ) -> Tensor:
        tiled = TiledLogits(image_BD, text, log_scale_1, negatives, tile)
        bias = bias_1.to(tiled.precision)
        loss, grad_log_scale, grad_bias = tiled.zeros(), tiled.zeros(), tiled.zeros()
        grad_image_BD = tiled.zeros(*image_BD.shape)
        for rows in tiled.rows():
            grad_image_MD = torch.zeros_like(rows.image_MD)
            for columns in tiled.columns(rows):
                logits_MN = rows.logits(columns).add_(bias)
                positives = tiled.positives(logits_MN, rows, columns)
                loss -= positives.masked_fill(positives.isneginf(), 0).sum()
                grad_logits_MN = logits_MN.sigmoid()
                grad_bias += grad_logits_MN.sum()
                tiled.positives(grad_logits_MN, rows, columns).sub_(1)  # no harm where invalid: the features are zero
                add_image_gradient(grad_image_MD, grad_logits_MN, columns)
                loss -= F.logsigmoid(logits_MN.neg_()).sum()
            grad_log_scale += (grad_image_MD * rows.image_MD).sum()  # logits less bias are linear in the scaled images
            grad_image_BD[rows.place] = text.mean_over_rows(grad_image_MD * tiled.scale_1)
        grad_bias -= text.valid_G[text.own].sum()
        ctx.save_for_backward(grad_image_BD, text.mean_over_rows(grad_log_scale), text.mean_over_rows(grad_bias))
        ctx.like = image_BD.dtype, log_scale_1, bias_1
        return text.mean_over_rows(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_image_BD, grad_log_scale, grad_bias = (grad * grad_loss for grad in ctx.saved_tensors)
        dtype, log_scale_1, bias_1 = ctx.like
        grad_log_scale_1 = grad_log_scale.to(log_scale_1.dtype).reshape(log_scale_1.shape)
        return grad_image_BD.to(dtype), grad_log_scale_1, grad_bias.to(bias_1.dtype).reshape(bias_1.shape), None, None, None
