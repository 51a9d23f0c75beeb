"""The gallery of flips: questions that one run gets and the other misses come in, what the page embeds of them goes out.

Which are embedded is spread over categories and both directions, never chosen by how they look. Each distinct image is
embedded once, as the run's thumbnail.
"""

from __future__ import annotations

import base64
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lift.common.errors import UserError

THUMBNAILS = "thumbnails.zip"
LARGEST_THUMBNAIL = 1 << 20
"""Bytes; a run's are some ten thousand. What claims more is no thumbnail."""
LONGEST_RESPONSE = 600
"""Characters of an answer that are embedded; the rest is counted."""
JPEG_START = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Gallery:
    flips: list[dict[str, Any]]
    """Embedded ones; `images` holds places in the list below, None for an image that is not there."""
    images: list[str]
    """Base64 of a JPEG each."""
    counts: dict[str, Any]
    """`total`, `embedded`, `left_out`, `total_a`, `total_b`, `without_image`."""


class Thumbnails:
    """The images of two runs by SHA-256, read where they are asked for. Use as a context."""

    def __init__(self, runs: Iterable[Path], tasks: Iterable[str]) -> None:
        self.paths = [path for task in tasks for run in runs if (path := run / task / THUMBNAILS).is_file()]

    def __enter__(self) -> Thumbnails:
        self._stack = ExitStack()
        self._place: dict[str, tuple[Path, zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for path in self.paths:
            try:
                archive = self._stack.enter_context(zipfile.ZipFile(path))
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(
                    f"{path}: expected the images of a run, found no readable zip: {error}. Run it again."
                ) from error
            for member in archive.infolist():
                self._place.setdefault(member.filename, (path, archive, member))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, image: str) -> bytes | None:
        """The JPEG, or None where no run has it. Raises UserError when it is damaged or no thumbnail."""
        place = self._place.get(f"{image}.jpg")
        if place is None:
            return None
        path, archive, member = place
        if member.file_size > LARGEST_THUMBNAIL:
            raise UserError(f"{path}: {member.filename} has {member.file_size} bytes; expected a thumbnail. Run it again.")
        try:
            content = archive.read(member)
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{path}: {member.filename} cannot be read: {error}. Run it again.") from error
        if not content.startswith(JPEG_START):
            raise UserError(f"{path}: {member.filename} is no JPEG. Run it again.")
        return content


def gallery(flips: Sequence[dict[str, Any]], thumbnails: Thumbnails, limit: int | None, room: int) -> Gallery:
    """Embeds flips in turn from every category and direction until `limit` or `room` is reached.

    Args:
        flips: of `eval.comparison`.
        limit: flips at most; None for all that fit.
        room: bytes at most, images in base64 included.
    """
    embedded: list[dict[str, Any]] = []
    images: list[str] = []
    place_of: dict[str, int | None] = {}
    used = 0
    for flip in in_turn(flips):
        if limit is not None and len(embedded) >= limit:
            break
        new = {image: _base64(thumbnails.read(image)) for image in flip["images"] if image not in place_of}
        card = _card(flip)
        written = json.dumps(card)  # in the page each of < > & is a \u escape of six characters
        used += len(written) + 5 * sum(map(written.count, "<>&")) + 100 + sum(len(text or "") + 3 for text in new.values())
        if used > room:
            break
        for image, text in new.items():
            place_of[image] = None if text is None else len(images)
            if text is not None:
                images.append(text)
        embedded.append(card | {"images": [place_of[image] for image in flip["images"]]})
    directions = Counter(flip["right"] for flip in flips)
    counts = {"total": len(flips), "embedded": len(embedded), "left_out": len(flips) - len(embedded)}
    counts |= {"total_a": directions["a"], "total_b": directions["b"]}
    counts["without_image"] = sum(None in card["images"] for card in embedded)
    return Gallery(embedded, images, counts)


def in_turn(flips: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One of every task, finest category and direction, then a second of each, and so on; a first, where there is one."""
    seen: Counter[tuple[str, str, str]] = Counter()
    ranked = []
    for number, flip in enumerate(flips):
        kind = (flip["task"], list(flip["categories"].values() or [""])[-1], flip["right"])
        ranked.append((seen[kind], kind[:2], kind[2], number, flip))
        seen[kind] += 1
    return (entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:4]))


def _card(flip: dict[str, Any]) -> dict[str, Any]:
    kept = ("task", "key", "right", "categories", "question", "options")
    passes = [
        {
            "options": single["options"],
            "answer": single["answer"],
            **{
                side: {
                    "response": _shortened(single[f"response_{side}"]),
                    "prediction": single[f"prediction_{side}"],
                    "correct": bool(single[f"correct_{side}"]),
                }
                for side in ("a", "b")
            },
        }
        for single in flip["passes"]
    ]
    return {name: flip[name] for name in kept} | {"answer": flip["answer"], "passes": passes}


def _shortened(text: str) -> str:
    more = len(text) - LONGEST_RESPONSE
    return text if more <= 0 else f"{text[:LONGEST_RESPONSE]}… [{more} more characters]"


def _base64(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()
