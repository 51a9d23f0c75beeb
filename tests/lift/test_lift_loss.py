"""Losses against float64 reference values of the original code, in one process and in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from lift.loss import contrastive_loss, cosine_loss


@pytest.fixture
def reference(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "fixtures" / "contrastive_loss" / "clip_loss_fp64.npz"))


def raw(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).requires_grad_()


def test_contrastive_value_and_gradients(reference: dict[str, np.ndarray]) -> None:
    image, text, scale = raw(reference["image_raw"]), raw(reference["text_raw"]), raw(reference["log_logit_scale"].reshape(1))
    loss = contrastive_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale, torch.ones(16, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["loss"]), abs=1e-12)
    np.testing.assert_allclose(image.grad, reference["grad_image"], atol=1e-12)
    np.testing.assert_allclose(text.grad, reference["grad_text"], atol=1e-12)
    np.testing.assert_allclose(scale.grad, reference["grad_log_logit_scale"].reshape(1), atol=1e-12)


def test_cosine_value_and_gradient(reference: dict[str, np.ndarray]) -> None:
    image = raw(reference["image_raw"])
    text = F.normalize(torch.from_numpy(reference["text_raw"]), dim=-1)
    loss = cosine_loss(F.normalize(image, dim=-1), text, torch.ones(16, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["cos_loss"]), abs=1e-12)
    np.testing.assert_allclose(image.grad, reference["cos_grad_image"], atol=1e-12)


def test_invalid_rows_are_as_if_they_were_not_there() -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor([2.0], dtype=torch.float64)
    valid = torch.tensor([True, False, True, True, False, True])
    every = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(
        contrastive_loss(image, text, scale, valid), contrastive_loss(image[valid], text[valid], scale, every)
    )
    torch.testing.assert_close(cosine_loss(image, text, valid), cosine_loss(image[valid], text[valid], every))


def _two_process_worker(rank: int, port: int, tensors: dict[str, torch.Tensor], out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = slice(rank * 8, (rank + 1) * 8)
    image = tensors["image"][own].clone().requires_grad_()
    text = tensors["text"][own].clone().requires_grad_()
    scale = tensors["scale"].clone().requires_grad_()
    loss = contrastive_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale, tensors["valid"][own])
    loss.backward()
    torch.save({"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dropped", [[], [3, 12]])
def test_two_processes_average_to_the_whole_batch(tmp_path: Path, dropped: list[int]) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(16, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.ones(16, dtype=torch.bool)
    valid[dropped] = False
    scale = torch.tensor([2.5], dtype=torch.float64)
    tensors = {"image": image, "text": text, "scale": scale, "valid": valid}
    mp.start_processes(_two_process_worker, args=(port, tensors, str(tmp_path)), nprocs=2, start_method="fork")
    whole = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items() if name != "valid"}
    loss = contrastive_loss(F.normalize(whole["image"], dim=-1), F.normalize(whole["text"], dim=-1), whole["scale"], valid)
    loss.backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(sum(r["loss"] for r in ranks) / 2, loss.detach())
    for name in ("image", "text"):  # gradients are averaged over processes by DDP
        torch.testing.assert_close(torch.cat([r[name] for r in ranks]) / 2, whole[name].grad)
    torch.testing.assert_close(sum(r["scale"] for r in ranks) / 2, whole["scale"].grad)
