"""Losses against plain float64 formulas and the original code's values, in one process and in two and three of uneven size."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lift.losses import Negatives, clip_loss, contrastive_loss, cosine_loss, sigmoid_loss, start_gather

REFERENCE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "contrastive_loss" / "clip_loss_fp64.npz"
TRAINED = ("image", "text", "log_scale", "bias")


# The formulas, on valid rows only, written for reading.


def plain_softmax(image: Tensor, text: Tensor, log_scale: Tensor, bank: Tensor | None, hard: list[Tensor] | None) -> Tensor:
    scale, total = log_scale.exp(), 0.0
    for i in range(len(image)):
        choices = torch.cat([text, *([] if bank is None else [bank]), *([] if hard is None else [hard[i]])])
        image_to_text = F.cross_entropy(scale * choices @ image[i], torch.tensor(i))
        text_to_image = F.cross_entropy(scale * image @ text[i], torch.tensor(i))
        total = total + (image_to_text + text_to_image) / 2
    return total / len(image)


def plain_sigmoid(
    image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, bank: Tensor | None, hard: list[Tensor] | None
) -> Tensor:
    total = 0.0
    for i in range(len(image)):
        others = [text[:i], text[i + 1 :], *([] if bank is None else [bank]), *([] if hard is None else [hard[i]])]
        positive, negative = text[i] @ image[i], torch.cat(others) @ image[i]
        total = total - F.logsigmoid(log_scale.exp() * positive + bias).sum()
        total = total - F.logsigmoid(-(log_scale.exp() * negative + bias)).sum()
    return total / len(image)


def plain_cosine(image: Tensor, text: Tensor) -> Tensor:
    return 1 - (image * text).sum(-1).mean()


@dataclass
class Case:
    """One loss on one batch of 11 rows."""

    objective: str
    valid: Tensor
    extra: tuple[str, ...] = ()
    tile: int = 4

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        image, text, bank = (0.6 * torch.randn(count, 5, generator=generator, dtype=torch.float64) for count in (11, 11, 7))
        hard = 0.6 * torch.randn(11, 3, 5, generator=generator, dtype=torch.float64)
        inputs = {"image": image, "text": text, "bank": bank, "hard": hard}
        inputs["hard_valid"] = torch.arange(33).reshape(11, 3) % 4 != 0
        inputs["hard_valid"][3] = False  # an image without any
        return inputs | {"log_scale": torch.tensor([1.7]).double(), "bias": torch.tensor([-2.0]).double()}

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients of the whole batch."""
        all_inputs = self.inputs()
        leaves = {name: all_inputs[name].requires_grad_() for name in TRAINED}
        image, text, bank, hard = leaves["image"][self.valid], leaves["text"][self.valid], None, None
        if "bank" in self.extra:
            bank = all_inputs["bank"]
        if "hard" in self.extra:
            keep = all_inputs["hard_valid"] if "hard_valid" in self.extra else torch.ones(11, 3, dtype=torch.bool)
            hard = [all_inputs["hard"][i][keep[i]] for i in self.valid.nonzero().flatten()]
        if self.objective == "cosine":
            loss = plain_cosine(image, text)
        elif self.objective == "sigmoid":
            loss = plain_sigmoid(image, text, leaves["log_scale"], leaves["bias"], bank, hard)
        else:
            loss = plain_softmax(image, text, leaves["log_scale"], bank, hard)
        return loss.detach(), dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True)
        )

    def run(self, own: slice) -> dict[str, Tensor]:
        """Loss and gradients of the process that holds these rows; invalid rows hold NaN, to show that they do not matter."""
        inputs, valid = self.inputs(), self.valid[own]
        for name in ("image", "text", "hard"):
            inputs[name][~self.valid] = torch.nan
        if "hard_valid" in self.extra:
            inputs["hard"][~inputs["hard_valid"]] = torch.nan
        image, text = inputs["image"][own].requires_grad_(), inputs["text"][own]
        log_scale, bias = inputs["log_scale"].requires_grad_(), inputs["bias"].requires_grad_()
        negatives = Negatives(
            inputs["bank"] if "bank" in self.extra else None,
            inputs["hard"][own] if "hard" in self.extra else None,
            inputs["hard_valid"][own] if "hard_valid" in self.extra else None,
        )
        if self.objective == "clip":
            loss = clip_loss(image, text.requires_grad_(), log_scale, valid, tile=self.tile)
        elif self.objective == "cosine":
            loss = cosine_loss(image, text.requires_grad_(), valid)
        elif self.objective == "sigmoid":
            loss = sigmoid_loss(image, start_gather(text, valid).wait(), log_scale, bias, negatives, self.tile)
        else:
            loss = contrastive_loss(image, start_gather(text, valid).wait(), log_scale, negatives, self.tile)
        (3 * loss).backward()  # as a loss scaler does
        leaves = {"image": image, "text": text, "log_scale": log_scale, "bias": bias}
        return {"loss": loss.detach()} | {name: leaf.grad / 3 for name, leaf in leaves.items() if leaf.grad is not None}


def make_cases() -> dict[str, Case]:
    whole, holes = torch.ones(11, dtype=torch.bool), torch.ones(11, dtype=torch.bool)
    holes[[0, 6, 7]] = False
    cases = {}
    for objective, extra in (
        ("contrastive", ()),
        ("contrastive", ("bank",)),
        ("contrastive", ("hard",)),
        ("contrastive", ("bank", "hard", "hard_valid")),
        ("sigmoid", ()),
        ("sigmoid", ("bank", "hard", "hard_valid")),
        ("clip", ()),
        ("cosine", ()),
    ):
        for name, valid in (("whole", whole), ("holes", holes)):
            for tile in (1, 4, 100):
                cases["-".join([objective, *extra, name, f"tile{tile}"])] = Case(objective, valid, extra, tile)
    return cases


CASES = make_cases()
CUTS = {1: [11], 2: [7, 4], 3: [5, 0, 6]}  # rows that each process holds


def _worker(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    first = sum(CUTS[world][:rank])
    results: dict[str, Any] = {name: case.run(slice(first, first + CUTS[world][rank])) for name, case in CASES.items()}
    results["nothing valid"] = Case("contrastive", torch.zeros(11, dtype=torch.bool)).run(
        slice(first, first + CUTS[world][rank])
    )
    results["traffic"] = _traffic()
    if world == 2 and REFERENCE.is_file():
        results["reference"] = _reference_on_one_of_two(rank)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def _traffic() -> dict[str, list[int]]:
    """Elements in each collective of the contrastive loss on 4 rows a process, in the order of the passes."""
    elements: list[int] = []

    def recorded(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            elements.append(args[0].numel())
            return collective(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, recorded(getattr(dist, name)))
    pending = start_gather(torch.randn(4, 5), torch.ones(4) > 0, rows=4)
    traffic = {"gather": elements.copy()}
    elements.clear()
    loss = contrastive_loss(torch.randn(4, 5, requires_grad=True), pending.wait(), torch.zeros(1, requires_grad=True))
    traffic["forward"] = elements.copy()
    elements.clear()
    loss.backward()
    return traffic | {"backward": elements}


def _reference_on_one_of_two(rank: int) -> dict[str, Tensor]:
    reference, own = np.load(REFERENCE), slice(rank * 8, (rank + 1) * 8)
    image, text = (torch.from_numpy(reference[name][own]).requires_grad_() for name in ("image_raw", "text_raw"))
    log_scale = torch.from_numpy(reference["log_logit_scale"].reshape(1)).requires_grad_()
    every = torch.ones(8, dtype=torch.bool)
    loss = clip_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), log_scale, every, rows=8, tile=3)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "log_scale": log_scale.grad}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Of every case, for each number of processes and each process."""
    by_world = {1: [{name: case.run(slice(0, 11)) for name, case in CASES.items()}]}
    for world in (2, 3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        out = tmp_path_factory.mktemp(f"world{world}")
        mp.start_processes(_worker, args=(world, port, str(out)), nprocs=world, start_method="fork")
        by_world[world] = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return by_world


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_processes_average_to_the_plain_formula(results: dict[int, list[dict[str, Any]]], name: str, world: int) -> None:
    loss, gradients = CASES[name].expected()
    ranks = [result[name] for result in results[world]]
    torch.testing.assert_close(sum(rank["loss"] for rank in ranks) / world, loss, rtol=0, atol=1e-12)
    for leaf in ranks[0].keys() - {"loss"}:
        pieces = [rank[leaf] for rank in ranks]
        mean = torch.cat(pieces) / world if leaf in ("image", "text") else sum(pieces) / world
        torch.testing.assert_close(mean, gradients[leaf], rtol=0, atol=1e-12)
    trained = {"clip": {"image", "text", "log_scale"}, "sigmoid": {"image", "log_scale", "bias"}, "cosine": {"image", "text"}}
    assert ranks[0].keys() - {"loss"} == trained.get(CASES[name].objective, {"image", "log_scale"})


def test_batch_without_a_valid_row_has_no_loss_and_no_gradient(results: dict[int, list[dict[str, Any]]]) -> None:
    for rank in results[3]:
        assert all((value == 0).all() for value in rank["nothing valid"].values())


def test_of_the_images_only_two_numbers_per_text_cross_between_processes(results: dict[int, list[dict[str, Any]]]) -> None:
    for rank in results[3]:
        assert rank["traffic"] == {"gather": [12 * 5, 12], "forward": [12, 12], "backward": []}


@pytest.fixture
def reference(shared: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(values)) for name, values in np.load(REFERENCE).items()}


def test_original_codes_values_in_one_process(reference: dict[str, Tensor]) -> None:
    image, text = reference["image_raw"].requires_grad_(), reference["text_raw"].requires_grad_()
    log_scale, every = reference["log_logit_scale"].reshape(1).requires_grad_(), torch.ones(16, dtype=torch.bool)
    loss = clip_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), log_scale, every, tile=5)
    gradients = torch.autograd.grad(loss, (image, text, log_scale))
    expected = (reference["grad_image"], reference["grad_text"], reference["grad_log_logit_scale"].reshape(1))
    torch.testing.assert_close((loss, *gradients), (reference["loss"], *expected), rtol=0, atol=1e-12)

    fixed = start_gather(F.normalize(text, dim=-1).detach(), every).wait()
    loss = contrastive_loss(F.normalize(image, dim=-1), fixed, log_scale, tile=5)
    gradients = torch.autograd.grad(loss, (image, log_scale))
    torch.testing.assert_close((loss, *gradients), (reference["loss"], expected[0], expected[2]), rtol=0, atol=1e-12)

    loss = cosine_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1).detach(), every)
    (gradient,) = torch.autograd.grad(loss, image)
    torch.testing.assert_close((loss, gradient), (reference["cos_loss"], reference["cos_grad_image"]), rtol=0, atol=1e-12)


def test_original_codes_values_in_two_processes(reference: dict[str, Tensor], results: dict[int, list[dict[str, Any]]]) -> None:
    ranks = [result["reference"] for result in results[2]]
    ours = {name: torch.stack([rank[name] for rank in ranks]) for name in ranks[0]}
    for name, key in (("loss", "w2_rank_loss"), ("image", "w2_grad_image"), ("text", "w2_grad_text")):
        torch.testing.assert_close(ours[name], reference[key], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours["log_scale"].mean(), reference["w2_grad_scale"].mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("holes-tile4")])
def test_gradcheck(name: str) -> None:
    case = CASES[name]
    inputs = {key: (tensor[:5] if key not in ("log_scale", "bias") else tensor) for key, tensor in case.inputs().items()}
    valid = case.valid[:5]
    negatives = Negatives(
        inputs["bank"] if "bank" in case.extra else None,
        inputs["hard"] if "hard" in case.extra else None,
        inputs["hard_valid"] if "hard_valid" in case.extra else None,
    )

    def loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        if case.objective == "clip":
            return clip_loss(image, text, log_scale, valid, tile=2)
        if case.objective == "cosine":
            return cosine_loss(image, text, valid)
        fixed = start_gather(text.detach(), valid).wait()
        if case.objective == "sigmoid":
            return sigmoid_loss(image, fixed, log_scale, bias, negatives, tile=2)
        return contrastive_loss(image, fixed, log_scale, negatives, tile=2)

    leaves = [inputs[name] for name in TRAINED]
    for leaf, name in zip(leaves, TRAINED, strict=True):
        leaf.requires_grad_(name != "text" or case.objective in ("clip", "cosine"))
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aligned", [1.0, -1.0])
def test_largest_scale_is_finite_and_exact_in_narrow_types(dtype: torch.dtype, aligned: float) -> None:
    """The features are rounded, nothing that follows is: float64 on the same rounded features gives the same values."""
    generator = torch.Generator().manual_seed(2)
    text = F.normalize(torch.randn(32, 16, generator=generator), dim=-1).to(dtype)
    image, every = (aligned * text), torch.ones(32, dtype=torch.bool)

    def run(image: Tensor, text: Tensor, precision: torch.dtype) -> list[Tensor]:
        image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
        log_scale = torch.tensor([math.log(100)], dtype=precision, requires_grad=True)
        bias = torch.tensor([-10.0], dtype=precision, requires_grad=True)
        fixed = start_gather(text.detach(), every).wait()
        both = clip_loss(image, text, log_scale, every, tile=7)
        pairs = sigmoid_loss(image, fixed, log_scale, bias, tile=7)
        one = contrastive_loss(image, fixed, log_scale, Negatives(bank_ND=-text.detach()), tile=7)
        leaves = (image, text, log_scale, bias)
        gradients = [torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (both, pairs, one)]
        return [both, pairs, one, *(tensor for group in gradients for tensor in group)]

    for narrow, wide in zip(run(image, text, torch.float32), run(image.double(), text.double(), torch.float64), strict=True):
        assert narrow.isfinite().all()
        tolerance = 1e-4 if narrow.dtype == torch.float32 else 2**-8  # bfloat16: the gradient itself is rounded at the end
        torch.testing.assert_close(narrow.double(), wide, rtol=tolerance, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    inputs, every = CASES["contrastive-whole-tile4"].inputs(), torch.ones(11, dtype=torch.bool)
    image, log_scale = inputs["image"].float().requires_grad_(), torch.tensor([math.log(100)], requires_grad=True)
    text, bias = start_gather(inputs["text"].float(), every).wait(), torch.tensor([-10.0])

    def run() -> list[Tensor]:
        losses = [contrastive_loss(image, text, log_scale, tile=4), sigmoid_loss(image, text, log_scale, bias, tile=4)]
        return losses + [gradient for loss in losses for gradient in torch.autograd.grad(loss, (image, log_scale))]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = run()
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_no_tensor_is_larger_than_the_features() -> None:
    image, text = (torch.randn(64, 4, requires_grad=True) for _ in range(2))
    log_scale, bias, every = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True), torch.ones(64) > 0
    with LargestTensor() as plain:
        F.cross_entropy(image @ text.T, torch.arange(64)).backward()
    assert plain.elements == 64 * 64
    fixed = start_gather(text.detach(), every).wait()
    for loss in (
        lambda: contrastive_loss(image, fixed, log_scale, Negatives(bank_ND=torch.randn(64, 4)), tile=8),
        lambda: sigmoid_loss(image, fixed, log_scale, bias, Negatives(bank_ND=torch.randn(64, 4)), tile=8),
        lambda: clip_loss(image, text, log_scale, every, tile=8),
    ):
        with LargestTensor() as tiled:
            loss().backward()
        assert tiled.elements == 64 * 4


@pytest.mark.parametrize("objective", ["contrastive", "sigmoid", "clip", "cosine"])
def test_pieces_with_cached_features_give_the_big_batchs_gradient(objective: str) -> None:
    """GradCache: encode pieces without gradient, take the loss of their features, encode again with the features' gradients."""
    generator = torch.Generator().manual_seed(3)
    pixels, captions = (torch.randn(10, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    image_tower, text_tower = (torch.nn.Linear(6, 4).double() for _ in range(2))
    log_scale, bias = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    valid = torch.arange(10) != 4

    def loss(image: Tensor, text: Tensor) -> Tensor:
        if objective == "clip":
            return clip_loss(image, text, log_scale, valid, tile=4)
        if objective == "cosine":
            return cosine_loss(image, text, valid)
        fixed = start_gather(text.detach(), valid).wait()
        return (
            contrastive_loss(image, fixed, log_scale, tile=4)
            if objective == "contrastive"
            else sigmoid_loss(image, fixed, log_scale, bias, tile=4)
        )

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for tower in (image_tower, text_tower) for p in tower.parameters() if p.grad is not None]
        image_tower.zero_grad()
        text_tower.zero_grad()
        return found

    whole = loss(image_tower(pixels), text_tower(captions))
    whole.backward()
    expected = gradients()
    with torch.no_grad():
        image_pieces = [image_tower(piece).requires_grad_() for piece in pixels.split(3)]
        text_pieces = [text_tower(piece).requires_grad_() for piece in captions.split(3)]
    cached = loss(torch.cat(image_pieces), torch.cat(text_pieces))
    cached.backward()
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-14)
    for piece, leaf in zip(pixels.split(3), image_pieces, strict=True):
        image_tower(piece).backward(leaf.grad)
    for piece, leaf in zip(captions.split(3), text_pieces, strict=True):
        if leaf.grad is not None:
            text_tower(piece).backward(leaf.grad)
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=1e-14)


def test_misuse_is_refused() -> None:
    text, every, log_scale = torch.randn(4, 3), torch.ones(4, dtype=torch.bool), torch.zeros(1)
    with pytest.raises(ValueError, match="gradient, which would be lost"):
        start_gather(text.clone().requires_grad_(), every)
    with pytest.raises(ValueError, match=r"expected \[B, D\] and bool \[B\]"):
        start_gather(text, every.float())
    gathered = start_gather(text, every).wait()
    with pytest.raises(ValueError, match=r"image_BD: expected shape \[4, 3\]"):
        contrastive_loss(torch.randn(5, 3), gathered, log_scale)
    with pytest.raises(ValueError, match=r"hard_valid_BK: expected shape \[4, 2\]"):
        contrastive_loss(text, gathered, log_scale, Negatives(hard_BKD=torch.randn(4, 2, 3), hard_valid_BK=every))
    with pytest.raises(ValueError, match="tile"):
        contrastive_loss(text, gathered, log_scale, tile=0)
