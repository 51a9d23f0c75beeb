"""Tiny images, tars and settings that tests are built from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lift.settings import (
    ClipTextSettings,
    PretrainSettings,
    SourceSettings,
    TextEncoderSettings,
    TextTransformSettings,
    VisionSettings,
)


def noise_image(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tiny_pretrain(pairs: Path, llm: Path, out: Path, objective: str = "contrastive") -> PretrainSettings:
    return PretrainSettings(
        data=[SourceSettings(kind="webdataset", path=pairs)],
        out=out,
        objective=objective,  # type: ignore[arg-type]
        text_encoder=TextEncoderSettings(kind="causal_lm", path=str(llm), precision="fp32"),
        text_transform=TextTransformSettings(kind="whiten"),
        vision=VisionSettings(image_size=16, patch_size=8, width=16, layers=2, heads=2),
        clip_text=ClipTextSettings(width=16, layers=1, heads=2, context_length=16, embedding_dim=16, vocabulary_size=300),
        batch_size=8,
        epochs=4,
        log_every=1,
        checkpoint_every=3,
        workers=0,
    )


def pretrain_on_one_thread(settings: PretrainSettings) -> None:
    """What a process of its own runs; here because such a process cannot import a test module."""
    import torch

    from lift.train import pretrain

    torch.set_num_threads(1)
    pretrain(settings)
