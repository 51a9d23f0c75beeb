"""Contrastive loss (symmetric InfoNCE) whose memory grows with the batch, not with its square.

Image features of this process and text features of all come in, a scalar goes out. An image's softmax is over texts, which
are all here; a text's is over the images of all processes, of which one log-sum-exp per text crosses between processes in the
forward pass and nothing in the backward pass. Only log-sum-exps are kept; the backward pass computes the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lift.losses.gather import GatheredText, gather_with_gradient, world_size
from lift.losses.tiles import DEFAULT_TILE, Negatives, TiledLogits, add_image_gradient, without_autocast


def contrastive_loss(
    image_BD: Tensor, text: GatheredText, log_scale_1: Tensor, negatives: Negatives | None = None, tile: int = DEFAULT_TILE
) -> Tensor:
    """Mean of image-to-text and text-to-image cross entropy (CLIP, arXiv 2103.00020, section 2.3) for a fixed text side
    (LIFT, arXiv 2506.04209, contrastive variant).

    The value belongs to this process's images and texts. The gradient is that of the whole batch's loss with respect to its
    images: it includes what they do to the softmax of other processes' texts. Hence every process must run the backward pass,
    each with the same factor on its loss.

    Args:
        image_BD: L2-normalised features of this process, any floating dtype; computed in float32 at least.
        text: from `start_gather(...).wait()`; says which rows are valid.
        log_scale_1: logarithm of the inverse temperature, one element.
        negatives: more texts in the image-to-text softmax.
        tile: rows and columns of a tile of logits; a few of them are held at a time.

    Raises:
        ValueError: the shapes do not fit.
    """
    loss: Tensor = _Contrastive.apply(image_BD, text.text_GD, log_scale_1, text, negatives, tile)  # type: ignore[no-untyped-call]
    return loss


def clip_loss(
    image_BD: Tensor, text_BD: Tensor, log_scale_1: Tensor, valid_B: Tensor, rows: int | None = None, tile: int = DEFAULT_TILE
) -> Tensor:
    """As `contrastive_loss`, with a gradient for the text features too: the CLIP baseline.

    Args:
        text_BD, valid_B, rows: features of this process and which rows are valid, as for `start_gather`.
    """
    return contrastive_loss(image_BD, gather_with_gradient(text_BD, valid_B, rows), log_scale_1, tile=tile)


class _Contrastive(torch.autograd.Function):
    """With logits L, row softmax P and column softmax Q (both zero where invalid), the gradient for L is (P + Q - 2 I) / 2N."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_GD: Tensor,
        log_scale_1: Tensor,
        text: GatheredText,
        negatives: Negatives | None,
        tile: int,
    ) -> Tensor:
        tiled = TiledLogits(image_BD, text, log_scale_1, negatives, tile)
        row_lse_B, column_lse_G = tiled.zeros(len(image_BD)) - torch.inf, tiled.zeros(len(text_GD)) - torch.inf
        positives = [tiled.zeros(0)]
        for rows in tiled.rows():
            for columns in tiled.columns(rows):
                logits_MN = rows.logits(columns)
                _logaddexp_(row_lse_B[rows.place], logits_MN.logsumexp(1))
                if columns.place is not None:
                    _logaddexp_(column_lse_G[columns.place], logits_MN.logsumexp(0))
                    positives.append(tiled.positives(logits_MN, rows, columns).clone())  # a view would keep the whole tile
        column_lse_G = _logsumexp_over_processes(column_lse_G)
        valid_B, positive_B = text.valid_G[text.own], torch.cat(positives)
        per_sample_B = (row_lse_B - positive_B) + (column_lse_G[text.own] - positive_B)
        loss = text.mean_over_rows(per_sample_B.masked_fill(~valid_B, 0).sum() / 2)
        # What is invalid has no mass in the backward pass: exp(-inf - inf) is 0, where exp(-inf + inf) is not a number.
        row_lse_B.masked_fill_(~valid_B, torch.inf)
        column_lse_G.masked_fill_(~text.valid_G, torch.inf)
        ctx.save_for_backward(image_BD, log_scale_1, row_lse_B, column_lse_G)
        ctx.text, ctx.negatives, ctx.tile = text, negatives, tile
        return loss

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, log_scale_1, row_lse_B, column_lse_G = ctx.saved_tensors
        tiled = TiledLogits(image_BD, ctx.text, log_scale_1, ctx.negatives, ctx.tile)
        factor = ctx.text.mean_over_rows(grad_loss / 2)
        grad_image_BD, grad_log_scale = torch.empty_like(image_BD), tiled.zeros()
        grad_text_GD = tiled.zeros(*ctx.text.text_GD.shape) if ctx.needs_input_grad[1] else None
        for rows in tiled.rows():
            grad_image_MD = torch.zeros_like(rows.image_MD)
            for columns in tiled.columns(rows):
                logits_MN = rows.logits(columns)
                grad_logits_MN = (logits_MN - row_lse_B[rows.place, None]).exp_()
                if columns.place is not None:
                    grad_logits_MN += logits_MN.sub_(column_lse_G[columns.place]).exp_()
                    tiled.positives(grad_logits_MN, rows, columns).sub_(2)  # no harm where invalid: the features are zero
                    if grad_text_GD is not None:
                        grad_text_GD[columns.place].addmm_(grad_logits_MN.T, rows.image_MD)
                add_image_gradient(grad_image_MD, grad_logits_MN, columns)
            grad_log_scale += (grad_image_MD * rows.image_MD).sum()  # logits are linear in the scaled images
            grad_image_BD[rows.place] = grad_image_MD * (tiled.scale_1 * factor)
        grad_text = None if grad_text_GD is None else (grad_text_GD * factor).to(ctx.text.text_GD.dtype)
        grad_log_scale_1 = (grad_log_scale * factor).to(log_scale_1.dtype).reshape(log_scale_1.shape)
        return grad_image_BD, grad_text, grad_log_scale_1, None, None, None


def _logaddexp_(total: Tensor, other: Tensor) -> None:
    torch.logaddexp(total, other, out=total)


def _logsumexp_over_processes(lse_G: Tensor) -> Tensor:
    """Of what each process has summed over its own images; -inf where no process holds a valid one."""
    if world_size() == 1:
        return lse_G
    peak_G = lse_G.clone()
    dist.all_reduce(peak_G, dist.ReduceOp.MAX)
    peak_G.masked_fill_(peak_G.isneginf(), 0)
    total_G = (lse_G - peak_G).exp_()
    dist.all_reduce(total_G)
    return peak_G + total_G.log_()
