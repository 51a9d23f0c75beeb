"""Image pipelines side by side: bytes of JPEG files in, normalised float32 batches in the main process out.

`python benchmarks/image_pipeline.py --data DIR_OR_TAR...` runs the official LIFT pipeline, PIL wholly in the worker, and ours
in turn, and prints samples per CPU-second of all processes, the ratios within each round, the main process's share, and how far
the resized pixels are from the official ones. Without `--data` it makes photo-like JPEGs.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms import functional

from lift.common.images import decode_rgb
from lift.images import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, crop_box, normalise, random_resized_crop
from lift.sources.samples import ImageLocation

SCALE = (0.9, 1.0)
SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Pipeline:
    name: str
    in_worker: Callable[[bytes, int, int], Any]
    """(file, image size, position) to what is sent to the main process."""
    collate: Callable[[list[Any]], Any]
    in_main: Callable[[Any, int], Tensor]
    """(collated batch, image size) to float32 [B, 3, S, S]."""


class Files(Dataset):
    """`length` items from `files`, over and over."""

    def __init__(self, files: list[ImageLocation], length: int, size: int, in_worker: Callable[[bytes, int, int], Any]) -> None:
        self.files, self.length, self.size, self.in_worker = files, length, size, in_worker

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Any:
        return self.in_worker(self.files[position % len(self.files)].read(), self.size, position)


def decode_with_pil(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def official_transform(images: list[Image.Image], size: int) -> Tensor:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        ]
    )
    return torch.stack([transform(image) for image in images])


def pil_crop(content: bytes, size: int, position: int) -> np.ndarray:
    image = decode_with_pil(content)
    box = crop_box(image.width, image.height, SCALE, np.random.default_rng(position))
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def our_crop(content: bytes, size: int, position: int) -> Tensor:
    return random_resized_crop(decode_rgb(content), size, SCALE, np.random.default_rng(position))


PIPELINES = (
    Pipeline("official", lambda content, size, position: decode_with_pil(content), list, official_transform),
    Pipeline(
        "PIL in worker",
        pil_crop,
        lambda crops: torch.from_numpy(np.stack(crops)),
        lambda pixels_B3HW, size: transforms.functional.normalize(pixels_B3HW / 255, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    ),
    Pipeline(
        "lift",
        our_crop,
        lambda crops: default_collate(crops).permute(0, 3, 1, 2),
        lambda pixels_B3HW, size: normalise(pixels_B3HW),
    ),
)


def cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measure(pipeline: Pipeline, files: list[ImageLocation], options: argparse.Namespace) -> tuple[float, float]:
    """(samples per CPU-second of main process and workers, share of the main process), the start of the workers included."""
    dataset = Files(files, options.samples, options.image_size, pipeline.in_worker)
    before = cpu_seconds(resource.RUSAGE_SELF), cpu_seconds(resource.RUSAGE_CHILDREN)
    loader = DataLoader(dataset, options.batch_size, num_workers=options.workers, collate_fn=pipeline.collate)
    # exhausting the loader joins its workers, and only then does their time count as that of children
    samples = sum(len(pipeline.in_main(batch, options.image_size)) for batch in loader)
    main = cpu_seconds(resource.RUSAGE_SELF) - before[0]
    workers = cpu_seconds(resource.RUSAGE_CHILDREN) - before[1]
    assert samples == options.samples
    return samples / (main + workers), main / (main + workers)


def fidelity(files: list[ImageLocation], size: int) -> dict[str, tuple[float, int]]:
    """Per way of resizing: mean and largest grey-level difference to the official resize of the same crop."""
    ours: list[np.ndarray] = []
    pil_box: list[np.ndarray] = []
    for position, file in enumerate(files):
        image = decode_with_pil(file.read())
        left, top, right, bottom = box = crop_box(image.width, image.height, SCALE, np.random.default_rng(position))
        official = np.asarray(
            functional.resized_crop(
                image, top, left, bottom - top, right - left, [size, size], transforms.InterpolationMode.BICUBIC, antialias=True
            )
        ).astype(int)
        ours.append(abs(our_crop(file.read(), size, position).numpy() - official))
        pil_box.append(abs(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)) - official))
    return {
        name: (float(np.mean([d.mean() for d in differences])), int(max(d.max() for d in differences)))
        for name, differences in (("lift", ours), ("PIL resize(box=)", pil_box))
    }


def find_files(sources: list[Path]) -> list[ImageLocation]:
    """The JPEGs of tars, of folders, and of tars in folders."""
    files = []
    for source in sources:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.suffix == ".tar":
                with tarfile.open(path, "r:") as archive:
                    members = [member for member in archive if member.isfile() and member.name.lower().endswith(SUFFIXES)]
                files += [ImageLocation(str(path), member.offset_data, member.size) for member in members]
            elif path.suffix.lower() in SUFFIXES:
                files.append(ImageLocation(str(path)))
    return files


def make_photos(folder: Path, count: int) -> list[ImageLocation]:
    """JPEGs of 256-400 px whose spectrum falls with frequency as that of photos does."""
    files = []
    for number in range(count):
        generator = np.random.default_rng(number)
        height, width = (int(side) for side in generator.integers(256, 401, 2))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(height, width)
        noise = np.fft.rfft2(generator.normal(size=(3, height, width))) / frequency**1.2
        levels = np.fft.irfft2(noise, s=(height, width))
        levels = levels[:1] + 0.3 * levels  # channels of a photo mostly agree
        pixels = np.clip(128 + 50 * levels / levels.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        path = folder / f"{number:04d}.jpg"
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=90)
        files.append(ImageLocation(str(path)))
    return files


def report(files: list[ImageLocation], options: argparse.Namespace) -> None:
    sizes = [Image.open(io.BytesIO(file.read())).size for file in files[:200]]
    width, height = (round(statistics.mean(side)) for side in zip(*sizes, strict=True))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    )
    print(
        f"{len(files)} JPEGs of {width} x {height} px on average; {options.samples} samples a run, {options.workers} workers, "
        f"batches of {options.batch_size}, {options.image_size} px, {options.rounds} rounds\n"
    )
    rounds = [{pipeline.name: measure(pipeline, files, options) for pipeline in PIPELINES} for _ in range(options.rounds)]
    print(f"{'pipeline':16} {'samples/CPU-s':>14} {'ratio (min-max)':>20} {'main process':>13}")
    for pipeline in PIPELINES:
        rates = [results[pipeline.name][0] for results in rounds]
        ratios = [results[pipeline.name][0] / results["official"][0] for results in rounds]
        share = statistics.median(results[pipeline.name][1] for results in rounds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{pipeline.name:16} {statistics.median(rates):14.0f} {spread:>20} {share:13.0%}")
    print(f"\n{'resize':16} {'mean difference':>16} {'largest':>8}   (grey levels, to the official resize of the same crop)")
    for name, (mean, largest) in fidelity(files[:100], options.image_size).items():
        print(f"{name:16} {mean:16.4f} {largest:8d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders or tars with JPEGs; made when left out")
    parser.add_argument("--samples", type=int, default=4096, help="per pipeline and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = find_files(options.data) if options.data else make_photos(Path(folder), 256)
        if not files:
            sys.exit(f"{', '.join(map(str, options.data))}: expected JPEG files or tars with them, found none.")
        report(files, options)


if __name__ == "__main__":
    main()
