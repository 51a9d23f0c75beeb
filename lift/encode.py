"""`lift encode`: a folder of image files in, one .npy of embeddings out, and beside it a .json that names its rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import atomic_file, require_folder, sha256_file, write_json
from lift.common.images import ImageFault, decode_image
from lift.common.reading import read_ahead
from lift.encoder import Encoder, load_encoder
from lift.settings import EncodeSettings

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def encode(settings: EncodeSettings) -> None:
    """Command `lift encode`: writes float32 [N, D], rows in sorted order of the files' paths below the folder.

    The .json has the paths (`images`, one a row), what was done to them, and the sha256 of the .npy that it belongs to.

    Raises:
        UserError: no images, one that cannot be decoded (unless `allow_undecodable`: its row is NaN and it is listed), or an
            encoder folder that is not whole.
    """
    out, folder = given(settings.out, "out"), require_folder(given(settings.images, "images"), "a folder of images")
    names, others = image_files(folder)
    if not names:
        raise UserError(f"{folder}: expected image files ({', '.join(sorted(SUFFIXES))}), found none.")
    encoder = load_encoder(settings.folder)
    undecodable: list[str] = []

    def load(name: str) -> Tensor | None:
        try:
            image = decode_image(folder / name)
        except ImageFault as error:
            if settings.allow_undecodable:
                return None
            raise UserError(
                f"{folder / name}: cannot be decoded: {error}. Mend or remove it, or give --allow_undecodable for a row of NaN."
            ) from error
        return encoder.pixel_values(image, settings.protocol)

    with atomic_file(out) as temporary, ThreadPoolExecutor(settings.workers) as pool:
        shape = (len(names), encoder.embedding_dim)
        rows_ND = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        with tqdm(total=len(names), desc="encode images", unit="image") as bar:
            for start, loaded in read_ahead(pool, load, names, settings.batch_size):
                rows_ND[start : start + len(loaded)] = _embed(encoder, loaded, settings.raw)
                undecodable += [name for name, pixels in zip(names[start:], loaded, strict=False) if pixels is None]
                bar.update(len(loaded))
        rows_ND.flush()
        del rows_ND
    write_json(
        out.with_suffix(".json"),
        {
            "sha256": sha256_file(out),
            "encoder": str(settings.folder),
            "encoder_hash": encoder.content_hash,
            "protocol": settings.protocol,
            "normalised": not settings.raw,
            "undecodable": undecodable,
            "images": names,
        },
    )
    left = f"; {others} files there are no images by their suffix" if others else ""
    bad = f", {len(undecodable)} of them undecodable (NaN)" if undecodable else ""
    print(f"{out}: {len(names)} images{bad}, {shape[1]} dimensions, protocol {settings.protocol}{left}")


def image_files(folder: Path) -> tuple[list[str], int]:
    """Paths below `folder` of the files with an image's suffix, sorted as text, and the number of other files."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.as_posix() for path in files if path.suffix.lower() in SUFFIXES)
    return names, len(files) - len(names)


def _embed(encoder: Encoder, loaded: Sequence[Tensor | None], raw: bool) -> np.ndarray:
    """float32 [len(loaded), D], NaN where there are no pixels."""
    out = np.full((len(loaded), encoder.embedding_dim), np.nan, np.float32)
    rows = [row for row, pixels in enumerate(loaded) if pixels is not None]
    if rows:
        embeddings_BD = encoder.image_embeddings(torch.stack([pixels for pixels in loaded if pixels is not None]))
        out[rows] = (embeddings_BD if raw else F.normalize(embeddings_BD, dim=-1)).cpu().numpy()
    return out
