"""The logits of this process's images against all texts and extra negatives, one tile at a time, never as a whole.

Features come in; tiles of logits go out, and gradients for a tile go back to its images. Everything is computed in float32
at least; on a GPU `torch.backends.cuda.matmul.allow_tf32` makes that fast, at 10 bits of mantissa where bfloat16 has 7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lift.losses.gather import GatheredText

DEFAULT_TILE = 1024  # rows and columns; a tile of 4 MiB stays in the cache of a CPU


@dataclass(frozen=True)
class Negatives:
    """Captions that no image of the batch belongs to: negatives that cost no encoder pass. They have no gradient.

    Attributes:
        bank_ND: negatives of every image of this process. A caption that is also in the batch counts twice,
            and against its own image.
        hard_BKD: negatives of one image each, such as SugarCrepe's (arXiv 2306.14610).
        hard_valid_BK: bool, False where an image has fewer than K; None if each has K.
    """

    bank_ND: Tensor | None = None
    hard_BKD: Tensor | None = None
    hard_valid_BK: Tensor | None = None


@dataclass(frozen=True)
class Columns:
    """Texts that meet the images of a row tile: one tile of logits.

    Attributes:
        text: [N, D], the same for each image, or [M, N, D], each image's own; zero where invalid.
        mask: 0 where valid, -inf elsewhere; broadcasts to [M, N].
        place: which of the gathered texts these are; None for extra negatives.
    """

    text: Tensor
    mask: Tensor
    place: slice | None = None


@dataclass(frozen=True)
class Rows:
    """Images of a row tile, times the scale; zero where invalid.

    Attributes:
        image_MD, mask_M1: the images and 0 where valid, -inf elsewhere.
        place: which of this process's images these are.
    """

    image_MD: Tensor
    mask_M1: Tensor
    place: slice

    def logits(self, columns: Columns) -> Tensor:
        """[M, N]; -inf where image or text is invalid."""
        if columns.text.ndim == 2:
            logits_MN = self.image_MD @ columns.text.T
        else:
            logits_MN = torch.bmm(columns.text, self.image_MD[:, :, None]).squeeze(2)
        return logits_MN.add_(columns.mask).add_(self.mask_M1)


def add_image_gradient(grad_image_MD: Tensor, grad_logits_MN: Tensor, columns: Columns) -> None:
    """Adds to the gradient for `Rows.image_MD`, in place."""
    if columns.text.ndim == 2:
        grad_image_MD.addmm_(grad_logits_MN, columns.text)
    else:
        grad_image_MD.add_(torch.bmm(grad_logits_MN[:, None], columns.text).squeeze(1))


class TiledLogits:
    """All pairs of one loss, as an outer loop over rows and an inner loop over columns.

    Raises:
        ValueError: the shapes of images, texts and negatives do not fit.
    """

    def __init__(
        self, image_BD: Tensor, text: GatheredText, log_scale_1: Tensor, negatives: Negatives | None, tile: int
    ) -> None:
        self.image_BD, self.text, self.negatives, self.tile = image_BD, text, negatives or Negatives(), tile
        self._check()
        self.precision = torch.promote_types(image_BD.dtype, torch.float32)
        self.scale_1 = log_scale_1.to(self.precision).exp().reshape(1)
        self.mask_G = self._mask(text.valid_G)

    def _check(self) -> None:
        count, dimension = self.text.own.stop - self.text.own.start, self.text.text_GD.shape[1]
        hard_BKD, hard_valid_BK, bank_ND = self.negatives.hard_BKD, self.negatives.hard_valid_BK, self.negatives.bank_ND
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("image_BD", self.image_BD, (count, dimension)),
            ("bank_ND", bank_ND, (0 if bank_ND is None else len(bank_ND), dimension)),
            ("hard_BKD", hard_BKD, (count, 0 if hard_BKD is None else hard_BKD.shape[1], dimension)),
            ("hard_valid_BK", hard_valid_BK, () if hard_BKD is None else tuple(hard_BKD.shape[:2])),
        ]
        for name, tensor, shape in expected:
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)} beside the gathered text, got {list(tensor.shape)}.")
        if self.tile < 1:
            raise ValueError(f"tile: expected a positive number of rows and columns, got {self.tile}.")

    def zeros(self, *shape: int) -> Tensor:
        """In the precision of the computation."""
        return self.image_BD.new_zeros(shape, dtype=self.precision)

    def _mask(self, valid: Tensor) -> Tensor:
        return self.zeros(*valid.shape).masked_fill_(~valid, -torch.inf)

    def rows(self) -> Iterator[Rows]:
        valid_B1, mask_B1 = self.text.valid_G[self.text.own, None], self.mask_G[self.text.own, None]
        for place in self._slices(len(self.image_BD)):
            image_MD = self.image_BD[place].masked_fill(~valid_B1[place], 0).to(self.precision)
            yield Rows(image_MD * self.scale_1, mask_B1[place], place)

    def columns(self, rows: Rows) -> Iterator[Columns]:
        for place in self._slices(len(self.text.text_GD)):
            yield Columns(self.text.text_GD[place].to(self.precision), self.mask_G[place], place)
        bank_ND, hard_BKD, hard_valid_BK = self.negatives.bank_ND, self.negatives.hard_BKD, self.negatives.hard_valid_BK
        if bank_ND is not None:
            for place in self._slices(len(bank_ND)):
                yield Columns(bank_ND[place].to(self.precision), self.zeros(1))
        if hard_BKD is not None:
            valid_MK = self.text.valid_G[self.text.own][rows.place, None]
            if hard_valid_BK is not None:
                valid_MK = valid_MK & hard_valid_BK[rows.place]
            hard_MKD = hard_BKD[rows.place].masked_fill(~valid_MK[..., None], 0).to(self.precision)
            yield Columns(hard_MKD, self._mask(valid_MK))

    def positives(self, tile_MN: Tensor, rows: Rows, columns: Columns) -> Tensor:
        """View of those elements of a tile whose image and text belong together; empty where the tile holds none."""
        if columns.place is None:
            return tile_MN.new_empty(0)
        return tile_MN.diagonal(self.text.own.start + rows.place.start - columns.place.start)

    def _slices(self, length: int) -> Iterator[slice]:
        return (slice(start, min(start + self.tile, length)) for start in range(0, length, self.tile))


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """For the passes of an autograd function: autocast would take its matrix products in half precision."""

    @functools.wraps(method)
    def wrapped(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return wrapped
