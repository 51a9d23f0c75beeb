"""Losses over the batch of all processes: contrastive and sigmoid for a fixed text side, cosine, and two-sided CLIP.

A fixed text side is known before the images are encoded and needs no gradient. So its features are gathered early, logits are
made a tile of columns at a time and never kept, and of the images only log-sum-exps cross processes: memory grows with the
batch, not with its square (DESIGN, section 5).

Shapes: B rows of this process, G rows of all W processes one after the other, N captions of a bank, K hard negatives of an
image, D the joint dimension, T columns of a tile. Processes may hold different numbers of rows, and rows may be invalid.

Every process returns W times its part of the loss of the whole batch, and its own rows get W times the gradient: their mean
over processes, which is what DDP takes, is the loss and the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Negatives(NamedTuple):
    """Captions that are negatives of images and nothing else; L2-normalised features without gradient."""

    bank_ND: Tensor | None = None
    """Negatives of every image."""
    hard_BKD: Tensor | None = None
    """Negatives of one image each."""
    hard_valid_BK: Tensor | None = None
    """False where an image has no such negative; all count without it."""


@dataclass
class Gathered:
    """Text features of all processes, on their way until `wait`."""

    own_BD: Tensor
    text_GD: Tensor
    valid_G: Tensor
    first: int
    """Row of G that is the first of this process."""
    works: list[Any] = field(default_factory=list)

    def wait(self) -> Gathered:
        for work in self.works:
            work.wait()
        self.works = []
        return self


def start_gather(text_BD: Tensor, valid_B: Tensor, rows: int | None = None) -> Gathered:
    """Begins to gather text features without gradient; to be called before the images are encoded, which hides it.

    Args:
        valid_B: False for rows that stand in for dropped samples; they are neither queries nor negatives.
        rows: the largest number of rows of a process, where all know it; otherwise it is asked, which waits for all.
    """
    if _world() == 1:
        return Gathered(text_BD, text_BD, valid_B, 0)
    rows = _most_rows(len(text_BD), text_BD.device) if rows is None else rows
    padded_RD, valid_R = _pad(text_BD.detach(), rows), _pad(valid_B, rows)
    text_GD = padded_RD.new_empty(_world() * rows, text_BD.shape[1])
    valid_G = valid_R.new_empty(_world() * rows)
    works = [
        dist.all_gather_into_tensor(text_GD, padded_RD, async_op=True),
        dist.all_gather_into_tensor(valid_G, valid_R, async_op=True),
    ]
    return Gathered(text_BD, text_GD, valid_G, _rank() * rows, works)


def fixed_text_contrastive_loss(
    image_BD: Tensor,
    gathered: Gathered,
    log_scale_1: Tensor,
    valid_B: Tensor,
    negatives: Negatives | None = None,
    tile: int = 2048,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, section 2.3; LIFT, contrastive variant) against text that is fixed.

    Half the mean cross entropy of images choosing among all captions, and half that of captions choosing among all images;
    `negatives` stand only in the former. Gradients flow to `image_BD` and `log_scale_1`.

    Args:
        image_BD: L2-normalised features.
        log_scale_1: logarithm of the inverse temperature.
        tile: columns of the logits in memory at a time.
    """
    gathered.wait()
    bank_ND, hard_BKD, hard_valid_BK = negatives or Negatives()
    return _FixedTextContrastive.apply(image_BD, log_scale_1, gathered, valid_B, bank_ND, hard_BKD, hard_valid_BK, tile)  # type: ignore[no-untyped-call]


class _FixedTextContrastive(torch.autograd.Function):
    """Forward keeps one log-sum-exp a row and a column; backward makes the logits again.

    With p the softmax of a row and q that of a column, the gradient by image i is
    scale / 2n * (sum_j (p_ij + q_ij) text_j - 2 text_i).
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        log_scale_1: Tensor,
        gathered: Gathered,
        valid_B: Tensor,
        bank_ND: Tensor | None,
        hard_BKD: Tensor | None,
        hard_valid_BK: Tensor | None,
        tile: int,
    ) -> Tensor:
        scaled_BD = _wide(image_BD) * _wide(log_scale_1).exp()
        row_lse_B = scaled_BD.new_full((len(image_BD),), -torch.inf)
        column_lse_G = scaled_BD.new_full((len(gathered.text_GD),), -torch.inf)
        for start, text_TD in _tiles(gathered.text_GD, tile):
            columns = slice(start, start + len(text_TD))
            logits_BT = (scaled_BD @ text_TD.T).masked_fill_(~gathered.valid_G[columns], -torch.inf)
            row_lse_B = torch.logaddexp(row_lse_B, _logsumexp(logits_BT, 1))
            column_lse_G[columns] = _logsumexp(logits_BT.masked_fill_(~valid_B[:, None], -torch.inf), 0)
        for _, text_TD in _tiles(bank_ND, tile):
            row_lse_B = torch.logaddexp(row_lse_B, _logsumexp(scaled_BD @ text_TD.T, 1))
        if hard_BKD is not None:
            row_lse_B = torch.logaddexp(row_lse_B, _logsumexp(_hard_logits(scaled_BD, hard_BKD, hard_valid_BK), 1))
        column_lse_G = _logsumexp_over_processes(column_lse_G)
        count = gathered.valid_G.sum().clamp(min=1)
        ctx.save_for_backward(image_BD, log_scale_1, valid_B, bank_ND, hard_BKD, hard_valid_BK, row_lse_B, column_lse_G, count)
        ctx.gathered, ctx.tile = gathered, tile
        own_column_B = column_lse_G[gathered.first : gathered.first + len(image_BD)]
        positive_B = (scaled_BD * _wide(gathered.own_BD)).sum(1)
        per_row_B = (row_lse_B + own_column_B - 2 * positive_B).masked_fill(~valid_B, 0)
        return per_row_B.sum() * _world() / (2 * count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, log_scale_1, valid_B, bank_ND, hard_BKD, hard_valid_BK, row_lse_B, column_lse_G, count = ctx.saved_tensors
        gathered: Gathered = ctx.gathered
        scale = _wide(log_scale_1).exp()
        scaled_BD = _wide(image_BD) * scale
        # rows and columns without a valid entry have weight 0 rather than exp(-inf + inf)
        row_lse_B = row_lse_B.masked_fill(~valid_B, torch.inf)
        column_lse_G = column_lse_G.masked_fill(~gathered.valid_G, torch.inf)
        text_BD = _wide(gathered.own_BD) * valid_B[:, None]
        weighted_BD = -2 * text_BD
        by_log_scale = -2 * (scaled_BD * text_BD).sum()
        for start, text_TD in _tiles(gathered.text_GD, ctx.tile):
            columns = slice(start, start + len(text_TD))
            logits_BT = scaled_BD @ text_TD.T
            weight_BT = (logits_BT - row_lse_B[:, None]).exp_().masked_fill_(~gathered.valid_G[columns], 0)
            weight_BT += (logits_BT - column_lse_G[columns]).exp_().masked_fill_(~valid_B[:, None], 0)
            weighted_BD.addmm_(weight_BT, text_TD)
            by_log_scale += torch.dot(weight_BT.view(-1), logits_BT.view(-1))
        for _, text_TD in _tiles(bank_ND, ctx.tile):
            logits_BT = scaled_BD @ text_TD.T
            weight_BT = (logits_BT - row_lse_B[:, None]).exp_()
            weighted_BD.addmm_(weight_BT, text_TD)
            by_log_scale += torch.dot(weight_BT.view(-1), logits_BT.view(-1))
        if hard_BKD is not None:
            logits_BK = _hard_logits(scaled_BD, hard_BKD, hard_valid_BK)
            weight_BK = (logits_BK - row_lse_B[:, None]).exp()
            weighted_BD += torch.einsum("bk,bkd->bd", weight_BK, _wide(hard_BKD))
            by_log_scale += (weight_BK * logits_BK.masked_fill(weight_BK == 0, 0)).sum()
        factor = gradients[0] * _world() / (2 * count)
        by_image_BD = (weighted_BD * (scale * factor)).to(image_BD.dtype)
        by_log_scale_1 = (by_log_scale * factor).to(log_scale_1.dtype).view_as(log_scale_1)
        return (by_image_BD, by_log_scale_1, *(None,) * 6)


def sigmoid_loss(
    image_BD: Tensor,
    gathered: Gathered,
    log_scale_1: Tensor,
    bias_1: Tensor,
    valid_B: Tensor,
    negatives: Negatives | None = None,
    tile: int = 2048,
) -> Tensor:
    """SigLIP (arXiv 2303.15343, section 3.2) against text that is fixed: each pair of image and caption is judged by itself.

    The sum over all pairs, over the number of images. Arguments as in `fixed_text_contrastive_loss`; gradients flow to
    `image_BD`, `log_scale_1` and `bias_1`.
    """
    gathered.wait()
    bank_ND, hard_BKD, hard_valid_BK = negatives or Negatives()
    scaled_BD = _wide(image_BD) * _wide(log_scale_1).exp()
    total = scaled_BD.new_zeros(())
    for start, text_TD in _tiles(gathered.text_GD, tile):
        valid_T = gathered.valid_G[start : start + len(text_TD)]
        total = total + checkpoint(_negative_pairs, scaled_BD, text_TD, bias_1, valid_B, valid_T, use_reentrant=False)
    for _, text_TD in _tiles(bank_ND, tile):
        total = total + checkpoint(_negative_pairs, scaled_BD, text_TD, bias_1, valid_B, None, use_reentrant=False)
    if hard_BKD is not None:
        logits_BK = torch.einsum("bd,bkd->bk", scaled_BD, _wide(hard_BKD)) + bias_1
        counted_BK = valid_B[:, None] if hard_valid_BK is None else valid_B[:, None] & hard_valid_BK
        total = total + (-F.logsigmoid(-logits_BK) * counted_BK).sum()
    # the own pair was counted as a negative one; -log sigmoid(x) + log sigmoid(-x) = -x turns it into the positive
    positive_B = (scaled_BD * _wide(gathered.own_BD)).sum(1) + bias_1
    total = total - (positive_B * valid_B).sum()
    return total * _world() / gathered.valid_G.sum().clamp(min=1)


def _negative_pairs(scaled_BD: Tensor, text_TD: Tensor, bias_1: Tensor, valid_B: Tensor, valid_T: Tensor | None) -> Tensor:
    counted_BT = valid_B[:, None] if valid_T is None else valid_B[:, None] & valid_T
    return (-F.logsigmoid(-(scaled_BD @ text_TD.T + bias_1)) * counted_BT).sum()


def cosine_loss(image_BD: Tensor, text_BD: Tensor, valid_B: Tensor) -> Tensor:
    """1 - cosine of the positive pairs (LIFT, cosine variant); needs no negatives."""
    per_row_B = (1 - (image_BD * text_BD).sum(-1)) * valid_B
    count = valid_B.sum()
    if _world() > 1:
        dist.all_reduce(count)
    return per_row_B.sum() * _world() / count.clamp(min=1)


def clip_loss(image_BD: Tensor, text_BD: Tensor, log_scale_1: Tensor, valid_B: Tensor) -> Tensor:
    """Symmetric InfoNCE with gradients to both sides (CLIP, section 2.3): the baseline, whose text tower is trained."""
    rows = _most_rows(len(image_BD), image_BD.device)
    image_GD, text_GD = (_gather_with_gradient(_pad(side_BD, rows)) for side_BD in (image_BD, text_BD))
    valid_G = _gather_with_gradient(_pad(valid_B, rows))
    own_B = torch.arange(len(image_BD), device=image_BD.device) + _rank() * rows
    kept = valid_B.nonzero().squeeze(1)
    scale = log_scale_1.exp()
    total = (image_GD.sum() + text_GD.sum()) * 0  # a process without a valid row takes part in the gathers' backward too
    for query_BD, target_GD in ((image_BD, text_GD), (text_BD, image_GD)):
        logits_BG = (scale * query_BD[kept] @ target_GD.T).masked_fill(~valid_G, -torch.inf)
        total = total + F.cross_entropy(logits_BG, own_B[kept], reduction="sum")
    return total * _world() / (2 * valid_G.sum().clamp(min=1))


def _tiles(text_GD: Tensor | None, tile: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of each tile, at least in float32."""
    for start in range(0, 0 if text_GD is None else len(text_GD), tile):
        assert text_GD is not None
        yield start, _wide(text_GD[start : start + tile])


def _hard_logits(scaled_BD: Tensor, hard_BKD: Tensor, hard_valid_BK: Tensor | None) -> Tensor:
    logits_BK = torch.einsum("bd,bkd->bk", scaled_BD, _wide(hard_BKD))
    return logits_BK if hard_valid_BK is None else logits_BK.masked_fill(~hard_valid_BK, -torch.inf)


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    """-inf over nothing, and over -inf alone."""
    if logits.shape[dim] == 0:
        return logits.new_full((logits.shape[1 - dim],), -torch.inf)
    return torch.logsumexp(logits, dim)


def _logsumexp_over_processes(lse_G: Tensor) -> Tensor:
    if _world() == 1:
        return lse_G
    largest_G = lse_G.clone()
    dist.all_reduce(largest_G, dist.ReduceOp.MAX)
    safe_G = largest_G.masked_fill(largest_G == -torch.inf, 0)
    sum_G = (lse_G - safe_G).exp()
    dist.all_reduce(sum_G)
    return safe_G + sum_G.log()


def _wide(tensor: Tensor) -> Tensor:
    """float32 of a half-precision tensor; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _most_rows(rows: int, device: torch.device) -> int:
    if _world() == 1:
        return rows
    most = torch.tensor(rows, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _pad(rows_BX: Tensor, rows: int) -> Tensor:
    """Zeros (False) after the rows, up to `rows` of them."""
    missing = rows - len(rows_BX)
    return torch.cat([rows_BX, rows_BX.new_zeros(missing, *rows_BX.shape[1:])]) if missing else rows_BX


def _gather_with_gradient(rows_RX: Tensor) -> Tensor:
    """Rows of all processes in rank order; gradients flow back to the process that owns the row."""
    if _world() == 1:
        return rows_RX
    if rows_RX.requires_grad:
        return torch.cat(dist_nn.all_gather(rows_RX.contiguous()))
    gathered = [torch.empty_like(rows_RX) for _ in range(_world())]
    dist.all_gather(gathered, rows_RX.contiguous())
    return torch.cat(gathered)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
