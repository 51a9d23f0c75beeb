"""One training step up to the gradients: a batch in, the loss of the batch of all processes and its gradients out.

A batch that does not fit is encoded in micro-batches twice: first without gradients, for the features that the loss needs all
together; then again, each micro-batch with the gradient of the loss with respect to its features (GradCache, arXiv
2101.06983). The gradients are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lift.data import Batch
from lift.images import normalise
from lift.losses import Negatives, TextGather, clip_loss, contrastive_loss, cosine_loss, sigmoid_loss, start_gather
from lift.model import ClipModel, Features, LiftModel, kept_patches
from lift.settings import PretrainSettings


class TrainingStep:
    """Fills the gradients of `model`; `wrapped` is the same model as the accelerator wraps it for several processes."""

    def __init__(
        self, settings: PretrainSettings, accelerator: Accelerator, model: LiftModel | ClipModel, wrapped: torch.nn.Module
    ) -> None:
        self.settings, self.accelerator, self.model, self.wrapped = settings, accelerator, model, wrapped

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """The loss, scaled so that its mean over the processes is the loss of the whole batch."""
        device = self.accelerator.device
        text = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.text.items()}
        cosine = self.settings.objective == "cosine"
        fixed = _FixedText(self.model, text, batch.valid_B.to(device), cosine) if isinstance(self.model, LiftModel) else None
        kept_BK = kept_patches(self.settings, step, self.accelerator.process_index, self.accelerator.num_processes)
        inputs = {
            "pixel_values_B3HW": batch.pixels_B3HW.to(device, non_blocking=True),
            "kept_BK": None if kept_BK is None else kept_BK.to(device, non_blocking=True),
            "tokens": None if fixed else text,
        }
        parts = list(self._parts(inputs, len(batch.keys)))
        if len(parts) == 1:
            loss = self._loss(self._encode(self.wrapped, parts[0]), fixed, batch.valid_B.to(device))
            self.accelerator.backward(loss)
            return loss.detach()
        return self._in_parts(parts, fixed, batch.valid_B.to(device))

    def _in_parts(self, parts: list[dict[str, Any]], fixed: _FixedText | None, valid_B: Tensor) -> Tensor:
        with torch.no_grad():
            encoded = [self._encode(self.model, part) for part in parts]
        leaves = Features(*(_leaf(tensors) for tensors in zip(*encoded, strict=True)))  # type: ignore[arg-type]
        loss = self._loss(leaves, fixed, valid_B)
        loss.backward()
        size = len(encoded[0].image_BD)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                features = self._encode(self.wrapped, part)
                # a sum whose gradient is the loss's: linear in the features, with the cached gradients as weights
                total = torch.zeros((), device=valid_B.device)
                for name, feature, leaf in zip(Features._fields, features, leaves, strict=True):
                    if feature is None or leaf is None or leaf.grad is None or not feature.requires_grad:
                        continue
                    of_batch = name in ("image_BD", "text_BD")
                    gradient = leaf.grad[number * size : (number + 1) * size] if of_batch else leaf.grad * last
                    total = total + (feature * gradient).sum()
                self.accelerator.backward(total)
        return loss.detach()

    def _parts(self, inputs: dict[str, Any], samples: int) -> Iterator[dict[str, Any]]:
        size = min(self.settings.micro_batch_size or samples, samples)
        for start in range(0, samples, size):
            yield {name: _rows(value, start, start + size) for name, value in inputs.items()}

    def _encode(self, model: torch.nn.Module, part: dict[str, Any]) -> Features:
        pixels_B3HW = normalise(part["pixel_values_B3HW"])
        with self.accelerator.autocast():
            return Features(*model(pixels_B3HW, part["tokens"], part["kept_BK"]))

    def _loss(self, features: Features, fixed: _FixedText | None, valid_B: Tensor) -> Tensor:
        image_BD, text_BD, log_scale_1, bias_1 = features
        tile = self.settings.loss_tile
        if fixed is None:
            assert text_BD is not None
            return clip_loss(image_BD, text_BD, log_scale_1, valid_B, rows=len(valid_B), tile=tile)
        if fixed.gather is None:
            return cosine_loss(image_BD, fixed.text_BD, valid_B)
        text = fixed.gather.wait()
        if bias_1 is not None:
            return sigmoid_loss(image_BD, text, log_scale_1, bias_1, fixed.negatives, tile)
        return contrastive_loss(image_BD, text, log_scale_1, fixed.negatives, tile)


class _FixedText:
    """Text features of a batch; those of the other processes are on their way while the images are encoded."""

    gather: TextGather | None

    def __init__(self, model: LiftModel, text: dict[str, Tensor], valid_B: Tensor, cosine: bool) -> None:
        with torch.no_grad():
            self.text_BD = model.text_features(text["embeddings"])
            # cosine compares a row with its own text only
            self.gather = None if cosine else start_gather(self.text_BD, valid_B, rows=len(valid_B))
            bank_ND = model.text_features(text["bank"]) if "bank" in text else None
            hard_BKD = model.text_features(text["hard"]) if "hard" in text else None
        has_more = bank_ND is not None or hard_BKD is not None
        self.negatives = Negatives(bank_ND, hard_BKD, text.get("hard_valid")) if has_more else None


def _leaf(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The features of all micro-batches as one tensor that collects a gradient; scalars are the same in all."""
    first = tensors[0]
    if first is None:
        return None
    whole = first if first.shape == (1,) else torch.cat([tensor for tensor in tensors if tensor is not None])
    return whole.detach().clone().requires_grad_()


def _rows(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, dict):
        return {name: tensor[start:stop] for name, tensor in value.items()}
    return None if value is None else value[start:stop]
