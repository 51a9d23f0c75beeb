"""Losses against their plain float64 formulas and the original code's values, in one process, in two and in three."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from loss_cases import OBJECTIVES, ROWS, Case, ours, plain, worker
from torch.nn import functional as F

from lift.loss import Negatives, clip_loss, cosine_loss, fixed_text_contrastive_loss, sigmoid_loss, start_gather

EXACT = {"atol": 1e-12, "rtol": 0}


@pytest.fixture
def reference(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "fixtures" / "contrastive_loss" / "clip_loss_fp64.npz"))


def raw(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).requires_grad_()


def test_clip_equals_the_original_code(reference: dict[str, np.ndarray]) -> None:
    image, text, scale = raw(reference["image_raw"]), raw(reference["text_raw"]), raw(reference["log_logit_scale"].reshape(1))
    every = torch.ones(16, dtype=torch.bool)
    loss = clip_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale, every)
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["loss"]), abs=1e-12)
    np.testing.assert_allclose(image.grad, reference["grad_image"], **EXACT)
    np.testing.assert_allclose(text.grad, reference["grad_text"], **EXACT)
    np.testing.assert_allclose(scale.grad, reference["grad_log_logit_scale"].reshape(1), **EXACT)


def test_fixed_text_equals_the_original_code(reference: dict[str, np.ndarray]) -> None:
    image, scale = raw(reference["image_raw"]), raw(reference["log_logit_scale"].reshape(1))
    text, every = F.normalize(torch.from_numpy(reference["text_raw"]), dim=-1), torch.ones(16, dtype=torch.bool)
    loss = fixed_text_contrastive_loss(F.normalize(image, dim=-1), start_gather(text, every), scale, every, tile=5)
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["loss"]), abs=1e-12)
    np.testing.assert_allclose(image.grad, reference["grad_image"], **EXACT)
    np.testing.assert_allclose(scale.grad, reference["grad_log_logit_scale"].reshape(1), **EXACT)


def test_cosine_equals_the_original_code(reference: dict[str, np.ndarray]) -> None:
    image = raw(reference["image_raw"])
    text = F.normalize(torch.from_numpy(reference["text_raw"]), dim=-1)
    loss = cosine_loss(F.normalize(image, dim=-1), text, torch.ones(16, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["cos_loss"]), abs=1e-12)
    np.testing.assert_allclose(image.grad, reference["cos_grad_image"], **EXACT)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tile", [1, 3, 7, 100])
def test_one_process_with_invalid_rows(objective: str, tile: int) -> None:
    case = Case.make()
    expected, expected_gradients = plain(objective, case)
    loss, gradients = ours(objective, case, slice(None), tile)
    torch.testing.assert_close(loss, expected, **EXACT)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_uneven_rows(world: int, tmp_path: Path) -> None:
    """The mean over processes of the loss, and of a shared parameter's gradient, is that of the whole batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(world, port, str(tmp_path)), nprocs=world)
    found = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    assert [len(part["cosine/3"][1]["image"]) for part in found] == ROWS[world]
    for name in found[0]:
        expected, expected_gradients = plain(name.partition("/")[0], Case.make())
        losses, gradients = zip(*(part[name] for part in found), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), expected, **EXACT)
        for leaf, gradient in expected_gradients.items():
            parts = [part[leaf] for part in gradients]
            whole = torch.cat(parts) / world if leaf in ("image", "text") else torch.stack(parts).mean(0)
            torch.testing.assert_close(whole, gradient, **EXACT, msg=lambda m, n=f"{name} {leaf}": f"{n}: {m}")


def test_gradcheck() -> None:
    case = Case.make()
    text, negatives = F.normalize(case.text, dim=-1), Negatives(case.bank, case.hard, case.hard_valid)
    image, scale, bias = (tensor.clone().requires_grad_() for tensor in (case.image, case.scale, case.bias))

    def contrastive(image: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fixed_text_contrastive_loss(image, start_gather(text, case.valid), scale, case.valid, negatives, tile=4)

    def sigmoid(image: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sigmoid_loss(image, start_gather(text, case.valid), scale, bias, case.valid, negatives, tile=4)

    assert torch.autograd.gradcheck(contrastive, (image, scale))
    assert torch.autograd.gradcheck(sigmoid, (image, scale, bias))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_valid_row_and_the_largest_scale_stay_finite(objective: str) -> None:
    case = Case.make(torch.float32)
    case.scale.fill_(float(np.log(100)))
    loss, gradients = ours(objective, case, slice(None), 3)
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients.values())
    case.valid.fill_(False)
    loss, gradients = ours(objective, case, slice(None), 3)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_half_precision_features_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    image, text = (F.normalize(torch.randn(512, 64, generator=generator), dim=-1).bfloat16() for _ in range(2))
    scale, valid = torch.tensor([4.6]), torch.ones(512, dtype=torch.bool)
    half = image.clone().requires_grad_()
    loss = fixed_text_contrastive_loss(half, start_gather(text, valid), scale, valid, tile=100)
    loss.backward()
    wide = image.double().requires_grad_()
    expected = fixed_text_contrastive_loss(wide, start_gather(text.double(), valid), scale.double(), valid)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    assert half.grad is not None and wide.grad is not None and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.double(), wide.grad, atol=1e-7, rtol=1e-2)
