"""Conversation files as a training set: every sample is checked once before training, so that none is skipped during it.

In: the sources of a stage and a ConversationEncoder. Out: a map-style dataset of token ids, labels and pixel values, and a
drop ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl, require_folder, sha256_file, sha256_text
from lift.common.images import ImageFault, decode_image
from lift.common.ledger import DropLedger
from lmm.conversation import IGNORED_LABEL, ConversationEncoder, SampleFault, parse_row
from lmm.settings import ConversationSource


@dataclass(frozen=True)
class Row:
    key: str
    """Unique name for the ledger: file, position and `id` of the row."""
    value: Any
    images_folder: Path | None
    length: int = 0
    """Tokens, image tokens included; known once the row was checked, as is `images`."""
    images: int = 0


def read_sources(sources: list[ConversationSource]) -> list[Row]:
    """All rows of all sources, in order. Raises UserError for a file that is missing, not JSON, not a list, or empty."""
    rows = []
    for source in sources:
        read = read_jsonl if source.annotations.suffix == ".jsonl" else read_json
        values = read(source.annotations, "conversations in LLaVA's format")
        if not isinstance(values, list) or not values:
            raise UserError(f"{source.annotations}: expected a non-empty list of conversations, found something else.")
        if source.images is not None:
            require_folder(source.images, "the images of " + source.annotations.name)
        for number, value in enumerate(values):
            name = value.get("id", "") if isinstance(value, dict) else ""
            rows.append(Row(f"{source.annotations}#{number}:{name}", value, source.images))
    return rows


def describe_sources(sources: list[ConversationSource]) -> list[dict[str, Any]]:
    """Identity of the data: sha256 of each annotation file, and of the names and sizes of the images it names."""
    described = []
    for source in sources:
        names: set[str] = set()
        for row in read_sources([source]):
            value = row.value.get("image") if isinstance(row.value, dict) else None
            names.update(str(name) for name in (value if isinstance(value, list) else [value]) if name)
        lines = [f"{name} {_size(Path(source.images or '', name))}" for name in sorted(names)]
        described.append(
            {
                "annotations": str(source.annotations),
                "annotations_sha256": sha256_file(source.annotations),
                "images": len(names),
                "images_sha256": sha256_text("\n".join(lines)),
            }
        )
    return described


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def load_image(path: Path) -> Image.Image:
    """RGB image, wholly decoded. Raises SampleFault when the file is missing or cannot be decoded to its end."""
    try:
        return decode_image(path)
    except FileNotFoundError as error:
        raise SampleFault("missing image", str(path)) from error
    except ImageFault as error:
        raise SampleFault("undecodable image", f"{path}: {error}") from error


class Check(NamedTuple):
    """Of one row: counts, and cause and detail of the fault (cause empty when there is none)."""

    supervised: int
    length: int
    images: int
    cause: str
    detail: str


class _Checks(Dataset[Check]):
    """Checks row by row."""

    def __init__(self, rows: list[Row], encoder: ConversationEncoder) -> None:
        self.rows, self.encoder = rows, encoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Check:
        row = self.rows[index]
        try:
            conversation = parse_row(row.value, row.images_folder)
            tokens = self.encoder.encode(conversation.messages)
            for path in conversation.images:
                load_image(path)
        except SampleFault as fault:
            return Check(0, 0, 0, fault.cause, fault.detail)
        supervised = sum(label != IGNORED_LABEL for label in tokens.labels)
        return Check(supervised, len(tokens.labels), len(conversation.images), "", "")


def check_samples(
    rows: list[Row], encoder: ConversationEncoder, ledger: DropLedger, workers: int, rank: int = 0, world_size: int = 1
) -> tuple[list[Row], int]:
    """Encodes every conversation and decodes every image once, shared among the ranks.

    Returns:
        The usable rows in order with their lengths, and their number of supervised tokens. The others are entered in `ledger`.
    """
    mine = list(range(rank, len(rows), world_size))
    checks = _Checks([rows[index] for index in mine], encoder)
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
    usable, supervised = [], 0
    for index, check in found:
        if check.cause:
            ledger.drop(rows[index].key, check.cause, check.detail)
        else:
            usable.append(replace(rows[index], length=check.length, images=check.images))
            supervised += check.supervised
    return usable, supervised


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples: `input_ids` and `labels` (lists of int), `pixel_values` (float32 [images, 3, H, W], None for text only)."""

    def __init__(self, rows: list[Row], encoder: ConversationEncoder, image_processor: Any) -> None:
        self.rows, self.encoder, self.image_processor = rows, encoder, image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UserError when a file that was good when checked no longer is."""
        row = self.rows[index]
        tokens = self.encoder.encode(parse_row(row.value, row.images_folder).messages)
        return {"input_ids": tokens.input_ids, "labels": tokens.labels, "pixel_values": self.pixels(index)}

    def pixels(self, index: int) -> torch.Tensor | None:
        images = self.load_images(index)
        return self.image_processor(images, return_tensors="pt")["pixel_values"] if images else None

    def load_images(self, index: int) -> list[Image.Image]:
        row = self.rows[index]
        try:
            return [load_image(path) for path in parse_row(row.value, row.images_folder).images]
        except SampleFault as fault:
            raise UserError(f"{row.key}: the image was readable before training and no longer is ({fault.detail}).") from fault
