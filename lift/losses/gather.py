"""Text features of all processes: started early for a fixed text side, differentiable for a trained one.

Rows of this process come in; the rows of all processes in rank order go out. Each process's rows are padded to the longest, and
padding is marked invalid, so that every process's place is known without moving rows again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(frozen=True)
class GatheredText:
    """Text features of the whole batch.

    Attributes:
        text_GD: features in rank order; zero where invalid.
        valid_G: False for rows that stand in for dropped samples and for padding.
        own: where this process's rows lie.
    """

    text_GD: Tensor
    valid_G: Tensor
    own: slice

    def mean_over_rows(self, total: Tensor) -> Tensor:
        """This process's total over its rows, scaled so that the mean over processes is the mean over all valid rows."""
        return total * world_size() / self.valid_G.sum().clamp(min=1)


@dataclass
class TextGather:
    """A gather under way. `wait` may be called once or more; on a GPU it holds back the stream, not the host."""

    text: GatheredText
    works: list[dist.Work]
    sent: tuple[Tensor, ...]  # must outlive the transfer

    def wait(self) -> GatheredText:
        for work in self.works:
            work.wait()
        self.works, self.sent = [], ()
        return self.text


def start_gather(text_BD: Tensor, valid_B: Tensor, rows: int | None = None) -> TextGather:
    """Begins to gather fixed text features, so that the transfer overlaps the image forward pass that follows.

    Every process must call it, at the same point among its collectives.

    Args:
        text_BD: features without gradient, any floating dtype (the narrower, the less is sent).
        valid_B: bool; False for rows that stand in for dropped samples.
        rows: the most rows that any process holds, where known; otherwise the processes exchange it, which holds up the host.

    Raises:
        ValueError: the text features have a gradient, which would be lost, or there are more than `rows` of them.
    """
    if text_BD.requires_grad:
        raise ValueError("start_gather: text_BD requires a gradient, which would be lost. A trained text side takes clip_loss.")
    text_RD, valid_R, own = _padded(text_BD, valid_B, rows)
    if world_size() == 1:
        return TextGather(GatheredText(text_RD, valid_R, own), [], ())
    text_GD, text_work = _start_all_gather(text_RD)
    valid_G, valid_work = _start_all_gather(valid_R)
    return TextGather(GatheredText(text_GD, valid_G, own), [text_work, valid_work], (text_RD, valid_R))


def gather_with_gradient(text_BD: Tensor, valid_B: Tensor, rows: int | None = None) -> GatheredText:
    """Gathers trained text features: each process's gradient for all rows is summed and returned to the owner of the row.

    Arguments as in `start_gather`. Every process must run the backward pass.
    """
    text_RD, valid_R, own = _padded(text_BD, valid_B, rows)
    if world_size() == 1:
        return GatheredText(text_RD, valid_R, own)
    valid_G, work = _start_all_gather(valid_R)
    work.wait()
    return GatheredText(_AllGather.apply(text_RD), valid_G, own)


def _padded(text_BD: Tensor, valid_B: Tensor, rows: int | None) -> tuple[Tensor, Tensor, slice]:
    """Rows of this process, zero where invalid, padded to R, the most that any process holds; and their place among all."""
    if text_BD.ndim != 2 or valid_B.shape != text_BD.shape[:1] or valid_B.dtype != torch.bool:
        got = f"{list(text_BD.shape)} and {valid_B.dtype} {list(valid_B.shape)}"
        raise ValueError(f"text_BD and valid_B: expected [B, D] and bool [B], got {got}.")
    count = len(text_BD)
    text_BD = text_BD.masked_fill(~valid_B[:, None], 0)
    if world_size() == 1:
        return text_BD, valid_B, slice(0, count)
    if rows is None:
        longest = torch.tensor(count, device=text_BD.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        rows = int(longest)
    if count > rows:
        raise ValueError(f"start_gather: this process holds {count} rows, more than the {rows} said to be the most.")
    first = dist.get_rank() * rows
    padding = rows - count
    return F.pad(text_BD, (0, 0, 0, padding)).contiguous(), F.pad(valid_B, (0, padding)), slice(first, first + count)


def _start_all_gather(own_RX: Tensor) -> tuple[Tensor, dist.Work]:
    gathered_GX = own_RX.new_empty(world_size() * len(own_RX), *own_RX.shape[1:])
    work = dist.all_gather_into_tensor(gathered_GX, own_RX, async_op=True)
    assert work is not None
    return gathered_GX, work


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_RD: Tensor) -> Tensor:
        gathered_GD, work = _start_all_gather(own_RD)
        work.wait()
        return gathered_GD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GD: Tensor) -> Tensor:
        grad_RD = grad_GD.new_empty(len(grad_GD) // world_size(), grad_GD.shape[1])
        dist.reduce_scatter_tensor(grad_RD, grad_GD.contiguous())
        return grad_RD
