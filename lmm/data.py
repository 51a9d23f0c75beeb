"""Conversation files as a training set: every sample is checked once before training, so that none is skipped during it.

In: the sources of a stage and a ConversationEncoder. Out: a map-style dataset of token ids, labels and pixel values, and a
drop ledger.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lmm.conversation import IGNORED_LABEL, ConversationEncoder, parse_row
from lmm.faults import SampleFault
from lmm.images import load_image
from lmm.rows import Row, Rows, describe_sources, read_sources

__all__ = ["Row", "Rows", "describe_sources", "load_image", "read_sources"]
"""What was here before and others import from here; the rest of this module is public too."""

NOTHING_SUPERVISED = "nothing supervised"
TOO_LONG = "longer than max_length"


class Check(NamedTuple):
    """Of one row: counts, and cause and detail of the fault (cause empty when there is none)."""

    supervised: int
    length: int
    """Tokens, those that were cut off included."""
    images: int
    cause: str
    detail: str
    cut: int = 0
    """Tokens that were cut off at max_length."""


class _Checks(Dataset[Check]):
    """Checks row by row."""

    def __init__(self, rows: Rows, encoder: ConversationEncoder | None, decode: bool) -> None:
        self.rows, self.encoder, self.decode = rows, encoder, decode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Check:
        row, length, images, supervised, cut = self.rows[index], 0, 0, 0, 0
        try:
            conversation = parse_row(row.value, row.image_store)
            images = len(conversation.images)
            if self.encoder is not None:
                tokens = self.encoder.tokens(conversation.messages)
                length, supervised = len(tokens.input_ids), sum(label != IGNORED_LABEL for label in tokens.labels)
                fitting = self.encoder.fit(tokens)
                cut = length - len(fitting.input_ids)
                supervised = sum(label != IGNORED_LABEL for label in fitting.labels)
            for image in conversation.images if self.decode else []:
                load_image(image)
        except SampleFault as fault:
            return Check(supervised, length, images, fault.cause, fault.detail)
        return Check(supervised, length, images, "", "", cut)


def check_rows(
    rows: Rows, encoder: ConversationEncoder | None, workers: int, rank: int = 0, world_size: int = 1, decode: bool = True
) -> list[Check]:
    """Encodes every conversation and decodes every image once, shared among the ranks. One Check a row, in order.

    Args:
        encoder: None leaves out what concerns tokens.
        decode: False leaves the images unread.
    """
    mine = list(range(rank, len(rows), world_size))
    checks = _Checks(rows.select(mine), encoder, decode)
    loader = DataLoader(checks, batch_size=32, num_workers=min(workers, len(mine) // 256), collate_fn=list)
    found: list[tuple[int, Check]] = []
    with tqdm(total=len(mine), desc="check samples", unit="sample", disable=rank > 0) as progress:
        for results in loader:
            found += zip(mine[len(found) : len(found) + len(results)], results, strict=True)
            progress.update(len(results))
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, found)
        found = sorted(item for part in gathered for item in part)
    return [check for _, check in found]


def check_samples(
    rows: Rows,
    encoder: ConversationEncoder,
    ledger: DropLedger,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    drop_unsupervised: bool = False,
) -> tuple[Rows, int]:
    """Checks all samples before training.

    Args:
        drop_unsupervised: a sample without a supervised token is dropped and counted like others, instead of being an error.
    Returns:
        The usable rows in order with their lengths and what was cut off them, and their number of supervised tokens. The
        others are entered in `ledger`.
    Raises:
        UserError: a sample has no supervised token, which is a fault of the template rather than of the sample.
    """
    checks = check_rows(rows, encoder, workers, rank, world_size)
    for index, check in enumerate(checks):
        if check.cause == NOTHING_SUPERVISED and not drop_unsupervised:
            raise UserError(
                f"{rows[index].key}: expected answers to learn from, but the template '{encoder.template_name}' leaves no "
                "supervised token. Look at it with `lmm inspect-mask`, choose another --template, or count such samples as "
                "dropped with --unsupervised drop."
            )
        if check.cause:
            ledger.drop(rows[index].key, check.cause, check.detail)
    numbers = [index for index, check in enumerate(checks) if not check.cause]
    usable = rows.select(numbers)
    usable.lengths[:] = [checks[index].length - checks[index].cut for index in numbers]
    usable.cut[:] = [checks[index].cut for index in numbers]
    usable.images[:] = [checks[index].images for index in numbers]
    return usable, sum(checks[index].supervised for index in numbers)


def require_positions(rows: Rows, positions: int, setting: str) -> None:
    """Refuses checked rows that go beyond the language model's positions: there it fails, or learns what it was not made for.

    Args:
        positions: that the language model has.
        setting: name of the setting that let them in, for the message.
    Raises:
        UserError: naming the longest.
    """
    longest = int(rows.lengths.argmax())
    if rows.lengths[longest] > positions:
        raise UserError(
            f"{rows[longest].key}: {rows.lengths[longest]} tokens, but the language model has {positions} positions. "
            f"Set {setting} to {positions} or less; longer samples are then dropped or cut, and counted."
        )


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples: `input_ids` and `labels` (lists of int), `pixel_values` (float32 [images, 3, H, W], None for text only)."""

    def __init__(self, rows: Rows, encoder: ConversationEncoder, image_processor: Any) -> None:
        self.rows, self.encoder, self.image_processor = rows, encoder, image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        tokens = self.encoder.encode(parse_row(row.value, row.image_store).messages)
        return {"input_ids": tokens.input_ids, "labels": tokens.labels, "pixel_values": self.pixels(index)}

    def pixels(self, index: int) -> torch.Tensor | None:
        """What the images of one sample give the model."""
        images = self.load_images(index)
        return self.image_processor(images, return_tensors="pt")["pixel_values"] if images else None

    def load_images(self, index: int) -> list[Image.Image]:
        """The RGB images of one sample. Raises UserError when one that was good when checked no longer is."""
        row = self.rows[index]
        try:
            return [load_image(image) for image in parse_row(row.value, row.image_store).images]
        except SampleFault as fault:
            raise UserError(f"{row.key}: the image was readable before training and no longer is ({fault.detail}).") from fault
