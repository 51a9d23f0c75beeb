"""Losses by their plain float64 formulas over the valid rows of all processes, and the workers that compute ours in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lift.loss import (
    Negatives,
    clip_loss,
    cosine_loss,
    fixed_text_contrastive_loss,
    sigmoid_loss,
    start_gather,
)

OBJECTIVES = ("contrastive", "contrastive with negatives", "sigmoid", "sigmoid with negatives", "cosine", "clip")
ROWS = {1: [7], 2: [5, 2], 3: [4, 0, 3]}
"""Rows of each process, by the number of processes."""
LEARNED = ("image", "text", "scale", "bias")


@dataclass
class Case:
    """7 rows, of which 2 are invalid; raw image and text features, which the loss normalises."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    valid: Tensor
    bank: Tensor
    hard: Tensor
    hard_valid: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float64) -> Case:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        valid = torch.tensor([True, True, False, True, True, False, True])
        hard_valid = torch.tensor(
            [[True, False], [True, True], [True, True], [False, False], [True, True], [True, False], [False, True]]
        )
        return cls(
            draw(7, 6), draw(7, 6), torch.tensor([1.7], dtype=dtype), torch.tensor([-1.3], dtype=dtype), valid,
            F.normalize(draw(5, 6), dim=-1), F.normalize(draw(7, 2, 6), dim=-1), hard_valid,
        )  # fmt: skip


def plain(objective: str, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by the definition, rows that are not valid taken out beforehand."""
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in LEARNED}
    image, text = (F.normalize(leaves[name][case.valid], dim=-1) for name in ("image", "text"))
    kind, _, more = objective.partition(" ")
    text = text if kind == "clip" else text.detach()
    logits = leaves["scale"].exp() * image @ text.T
    extra = [logits]
    if more:
        hard = leaves["scale"].exp() * torch.einsum("bd,bkd->bk", image, case.hard[case.valid])
        extra += [leaves["scale"].exp() * image @ case.bank.T, hard.masked_fill(~case.hard_valid[case.valid], -torch.inf)]
    own = torch.arange(len(image))
    if kind in ("contrastive", "clip"):
        rows = F.cross_entropy(torch.cat(extra, 1), own)
        loss = (rows + F.cross_entropy(logits.T, own)) / 2
    elif kind == "sigmoid":
        sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
        loss = -F.logsigmoid(sign * (logits + leaves["bias"])).sum()
        loss = loss - sum((F.logsigmoid(-(part + leaves["bias"])).sum() for part in extra[1:]), torch.zeros(()))
        loss = loss / len(image)
    else:
        loss = (1 - (image * text).sum(1)).mean()
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def ours(objective: str, case: Case, rows: slice, tile: int) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's loss and its gradients, of its own `rows`."""
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in LEARNED}
    leaves |= {name: getattr(case, name)[rows].clone().requires_grad_() for name in ("image", "text")}
    image, text = (F.normalize(leaves[name], dim=-1) for name in ("image", "text"))
    valid = case.valid[rows]
    kind, _, more = objective.partition(" ")
    options: dict[str, Any] = {"tile": tile}
    if more:
        options["negatives"] = Negatives(case.bank, case.hard[rows], case.hard_valid[rows])
    if kind == "clip":
        loss = clip_loss(image, text, leaves["scale"], valid)
    elif kind == "cosine":
        loss = cosine_loss(image, text.detach(), valid)
    elif kind == "sigmoid":
        loss = sigmoid_loss(image, start_gather(text.detach(), valid), leaves["scale"], leaves["bias"], valid, **options)
    else:
        loss = fixed_text_contrastive_loss(image, start_gather(text.detach(), valid), leaves["scale"], valid, **options)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def worker(rank: int, world: int, port: int, out: str) -> None:
    """Saves what `ours` gives for every objective and tile."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    first = sum(ROWS[world][:rank])
    rows = slice(first, first + ROWS[world][rank])
    found = {f"{name}/{tile}": ours(name, Case.make(), rows, tile) for name in OBJECTIVES for tile in (3, 100)}
    torch.save(found, f"{out}/{world}-{rank}.pt")
    dist.destroy_process_group()
