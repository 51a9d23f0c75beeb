"""Validation during pretraining: held-out pairs in, loss and retrieval recall out, at an interval.

The text side of the held-out captions is made once. Images go through the evaluation preprocessing; every process encodes its
share, and all get the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lift.common.errors import UserError
from lift.common.images import ImageFault, decode_image
from lift.common.ledger import DropLedger
from lift.images import image_processor
from lift.model import ClipModel, LiftModel
from lift.settings import PretrainSettings
from lift.sources import Sample, Samples
from lift.store import EmbeddingStore
from lift.text_side import FixedTextSide, TrainedTextSide

IMAGES_AT_ONCE = 64


class Validation:
    """Held-out pairs of one run.

    Raises:
        UserError: a held-out pair cannot be used; numbers of two runs are comparable only on the same pairs.
    """

    def __init__(self, settings: PretrainSettings, samples: Samples, text: EmbeddingStore | PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.samples: list[Sample] = samples[: settings.validation.samples]
        captions = [next(iter(sample.captions.values())) for sample in self.samples]
        self._side: FixedTextSide | TrainedTextSide
        if isinstance(text, EmbeddingStore):
            ledger = DropLedger()
            self._side = FixedTextSide(text, samples, ledger)
            if len(ledger):
                raise UserError(
                    f"validation.embeddings {text.folder}: {ledger.summary(len(samples))}. Delete it, or mend the data."
                )
        else:
            self._side = TrainedTextSide(text, settings.clip_text.context_length)
        self._captions = captions
        counts = np.concatenate([shard.caption_counts() for shard in samples.shards])
        self._numbers = (np.cumsum(counts) - counts)[: len(self.samples)]
        self._processor = image_processor(settings.vision.image_size)

    @torch.no_grad()
    def __call__(self, model: LiftModel | ClipModel, device: torch.device) -> dict[str, float]:
        """`validation_loss`, R@1 both ways (shares), and their mean `validation_recall`."""
        model.eval()
        image_ND, text_ND = self._gather(self._features(model, device))
        model.train()
        image_ND, text_ND = image_ND.to(device), text_ND.to(device)
        return {"validation_loss": self._loss(model, image_ND, text_ND), **recall_at_1(image_ND, text_ND)}

    def _features(self, model: LiftModel | ClipModel, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of this process's share, on the host."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = range(rank * len(self.samples) // world, (rank + 1) * len(self.samples) // world)
        images, texts = [], []
        for start in range(own.start, own.stop, IMAGES_AT_ONCE):
            numbers = range(start, min(start + IMAGES_AT_ONCE, own.stop))
            pixels = self._processor(images=[_decoded(self.samples[i]) for i in numbers], return_tensors="pt")["pixel_values"]
            images.append(model(pixels.to(device)).image_BD.cpu())
            side = self._side(0, self._numbers[numbers.start : numbers.stop], [], [self._captions[i] for i in numbers])
            tensors = {name: tensor.to(device) for name, tensor in side.items()}
            text = model.text_features(tensors["embeddings"]) if isinstance(model, LiftModel) else model.text_features(tensors)
            texts.append(text.float().cpu())
        nothing = torch.empty(0)  # of a process beyond the last sample
        return (torch.cat(images), torch.cat(texts)) if images else (nothing, nothing)

    def _gather(self, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        parts = [part for part in parts if len(part[0])]
        return torch.cat([image for image, _ in parts]), torch.cat([text for _, text in parts])

    def _loss(self, model: LiftModel | ClipModel, image_ND: Tensor, text_ND: Tensor) -> float:
        """The training objective over held-out batches of the training size, extra negatives left out."""
        total, size = 0.0, self.settings.batch_size
        for start in range(0, len(image_ND), size):
            image_BD, text_BD = image_ND[start : start + size], text_ND[start : start + size]
            logits_BB = model.log_scale.exp() * image_BD @ text_BD.T
            target_B = torch.arange(len(image_BD), device=image_BD.device)
            if self.settings.objective == "cosine":
                loss = 1 - (image_BD * text_BD).sum(-1).mean()
            elif self.settings.objective == "sigmoid":
                sign_BB = 2 * torch.eye(len(image_BD), device=image_BD.device) - 1
                assert isinstance(model, LiftModel) and model.bias is not None
                loss = -F.logsigmoid(sign_BB * (logits_BB + model.bias)).sum(1).mean()
            else:
                loss = (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2
            total += float(loss) * len(image_BD)
        return total / len(image_ND)


def recall_at_1(image_ND: Tensor, text_ND: Tensor) -> dict[str, float]:
    """Share of the N images whose nearest text is their own, and of the texts; a tie counts as a miss."""
    shares = []
    for query_ND, target_ND in ((image_ND, text_ND), (text_ND, image_ND)):
        hits = 0
        for start in range(0, len(query_ND), 1024):
            similarity_QN = query_ND[start : start + 1024] @ target_ND.T
            own_Q = similarity_QN.diagonal(start).clone()
            hits += int(((similarity_QN >= own_Q[:, None]).sum(1) == 1).sum())
        shares.append(hits / len(query_ND))
    names = ("validation_image_to_text_recall", "validation_text_to_image_recall")
    return {**dict(zip(names, shares, strict=True)), "validation_recall": sum(shares) / 2}


def _decoded(sample: Sample) -> Any:
    try:
        return decode_image(sample.image.read())
    except (OSError, ImageFault) as error:
        raise UserError(f"validation.data: the image of {sample.key} cannot be used: {error}. Mend or remove it.") from error
