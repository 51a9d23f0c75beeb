"""Features of a frozen vision tower on disk, so that training need not compute them anew in each epoch.

In: a LLaVA folder, the dataset of a stage, a folder. Out: one file per distinct image in it, and a dataset whose samples bring
features instead of pixels. Files are named by the content of the image, below a folder named by tower, layer, preprocessing and
precision. They are written whole or not at all, and each is checked before training: interrupted work goes on, and a
damaged file is made again. A file takes 2 bytes per feature: 1.2 MB for the 576 x 1,024 of CLIP ViT-L/14 at 336 pixels.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModel, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lift.common.errors import UserError, first_line
from lift.common.files import atomic_file, sha256_text, write_json
from lmm.build import DTYPES
from lmm.data import ConversationDataset
from lmm.settings import StageSettings

TOWER_PREFIX = "vision_tower."
IMAGES_PER_BATCH = 32


def image_key(image: Image.Image) -> str:
    """Hash of an RGB image's pixels and size, whatever file or column it came from."""
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).hexdigest()[:40]


class FeatureCache:
    """Files of features below one folder.

    Args:
        folder: made when it is not there; caches of several towers may share it.
        identity: whatever decides the features (see `cache_identity`).
        shape: (tokens, width) of one image's features.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shape: tuple[int, int]) -> None:
        self.folder, self.shape = folder / sha256_text(json.dumps(identity, sort_keys=True))[:16], shape
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "cache.json", {**identity, "shape": list(shape), "format": "float16, then CRC-32"})
        except OSError as error:
            raise UserError(
                f"{folder}: the feature cache cannot be written: {error.strerror}. Choose another folder."
            ) from error

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.f16"

    def read(self, key: str) -> torch.Tensor | None:
        """float16 [1, tokens, width]; None when the file is missing, cut, or does not have its checksum."""
        try:
            content = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        values = content[:-4]
        if len(values) != 2 * self.shape[0] * self.shape[1] or zlib.crc32(values) != int.from_bytes(content[-4:], "little"):
            return None
        return torch.from_numpy(np.frombuffer(values, dtype="<f2").astype(np.float16)).view(1, *self.shape)

    def write(self, key: str, features: torch.Tensor) -> None:
        """Stores features [tokens, width] as float16. Raises UserError when one is beyond its range."""
        half = features.to("cpu", torch.float16)
        if not torch.isfinite(half).all():
            raise UserError("cache_features: the tower's features exceed the range of float16. Train without the cache.")
        values = half.numpy().astype("<f2").tobytes()
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(values + zlib.crc32(values).to_bytes(4, "little"))


def cache_identity(tower: nn.Module, image_processor: Any, layer: int, precision: str) -> dict[str, Any]:
    """What decides an image's features: weights and configuration of the tower, layer, preprocessing, precision."""
    weights = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    module: Any = tower
    return {
        "tower": weights.hexdigest(),
        "tower_config": sha256_text(json.dumps(module.config.to_diff_dict(), sort_keys=True, default=str)),
        "layer": layer,
        "preprocessing": sha256_text(json.dumps(image_processor.to_dict(), sort_keys=True, default=str)),
        "precision": precision,
    }


class _Missing(Dataset[list[tuple[str, torch.Tensor | None]]]):
    """Per sample, for each of its images: key, and pixel values [1, 3, H, W] when the cache does not hold its features."""

    def __init__(self, indices: list[int], load_images: Callable[[int], list[Image.Image]], image_processor: Any, cache: Any):
        self.indices, self.load_images, self.image_processor, self.cache = indices, load_images, image_processor, cache

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> list[tuple[str, torch.Tensor | None]]:
        found: list[tuple[str, torch.Tensor | None]] = []
        for image in self.load_images(self.indices[position]):
            key = image_key(image)
            known = self.cache.read(key) is not None
            found.append((key, None if known else self.image_processor([image], return_tensors="pt")["pixel_values"]))
        return found


def fill(
    cache: FeatureCache,
    tower: Any,
    layer: int,
    dataset: ConversationDataset,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> dict[int, list[str]]:
    """Computes what is missing of the features of all images, shared among the ranks.

    Args:
        tower: vision tower in evaluation mode, on the device that computes.
        dataset: the samples; their rows must have been checked, so that `images` is known.
    Returns:
        Per index of a sample with images, their keys in the cache.
    """
    mine = dataset.rows.images.nonzero()[0].tolist()[rank::world_size]
    missing = _Missing(mine, dataset.load_images, dataset.image_processor, cache)
    loader = DataLoader(missing, batch_size=8, num_workers=min(workers, len(mine) // 64), collate_fn=list)
    keys: dict[int, list[str]] = {}
    waiting: dict[str, torch.Tensor] = {}
    computed = 0

    def compute() -> None:
        features = tower_features(tower, torch.cat(list(waiting.values())), layer)
        for key, value in zip(waiting, features, strict=True):
            cache.write(key, value)
        waiting.clear()

    with tqdm(total=len(mine), desc="cache features", unit="sample", disable=rank > 0) as progress:
        for batch in loader:
            for found in batch:
                keys[mine[len(keys)]] = [key for key, _ in found]
                new = {key: pixels for key, pixels in found if pixels is not None and key not in waiting}
                waiting.update(new)
                computed += len(new)
            if len(waiting) >= IMAGES_PER_BATCH:
                compute()
            progress.update(len(batch))
        if waiting:
            compute()
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, keys)
        keys = {index: names for part in gathered for index, names in part.items()}
    if rank == 0:
        print(
            f"{cache.folder}: features of {len({key for names in keys.values() for key in names})} images, {computed} computed"
        )
    return keys


@torch.no_grad()
def tower_features(tower: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Hidden states of `layer` without the class token, [images, tokens, width]: what the projector takes in LLaVA-1.5."""
    inputs = pixels.to(next(tower.parameters()).device, next(tower.parameters()).dtype)
    return tower(inputs, output_hidden_states=True).hidden_states[layer][:, 1:]


def take_features(llava: LlavaConfig, tower: nn.Module) -> None:
    """Makes the tower of a model return what it is given, as if it had computed it: features [images, tokens, width].

    Its weights stay where they are, so that checkpoints and the finished folder are complete.

    Raises:
        UserError: the tower learns, so that its features would change.
    """
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise UserError("cache_features: the vision tower learns in this stage; its features change. Train without the cache.")
    layer = feature_layer(llava)

    def forward(pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        class_token = pixel_values.new_zeros(pixel_values.shape[0], 1, pixel_values.shape[2])
        states = torch.cat([class_token, pixel_values], dim=1)
        count = abs(layer) + (layer >= 0)
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states,) * count)

    tower.forward = forward  # type: ignore[method-assign]


def feature_layer(llava: LlavaConfig) -> int:
    """Raises UserError when the model joins the features of several layers."""
    layer = llava.vision_feature_layer
    if not isinstance(layer, int):
        raise UserError(f"cache_features: expected a model that uses one layer of its tower, found {layer}.")
    return layer


def load_tower(model: Path, llava: LlavaConfig, precision: torch.dtype) -> Any:
    """The vision tower alone of a LLaVA folder, in evaluation mode, on the CPU.

    Raises:
        UserError: a weight is missing, left over or misshapen.
    """
    state: dict[str, torch.Tensor] = {}
    try:
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (not a dict)
                    if name.startswith(TOWER_PREFIX):
                        state[name.removeprefix(TOWER_PREFIX).removeprefix("vision_model.")] = weights.get_tensor(name)
        tower: Any = AutoModel.from_config(llava.vision_config)
        tower.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{model}: the vision tower cannot be loaded by itself: {first_line(error)}") from error
    return tower.to(precision).eval()


class CachedDataset(ConversationDataset):
    """A ConversationDataset whose `pixel_values` are cached features: float16 [images, tokens, width]."""

    def __init__(self, dataset: ConversationDataset, cache: FeatureCache, keys: dict[int, list[str]]) -> None:
        super().__init__(dataset.rows, dataset.encoder, dataset.image_processor)
        self.cache, self.keys = cache, keys

    def pixels(self, index: int) -> torch.Tensor | None:
        """Raises UserError when a file that was good when checked no longer is."""
        if index not in self.keys:
            return None
        features = []
        for key in self.keys[index]:
            found = self.cache.read(key)
            if found is None:
                raise UserError(
                    f"{self.cache.path(key)}: the cached features were there before training and are now missing or damaged. "
                    "Run the same command again: it computes them anew and goes on from the newest checkpoint."
                )
            features.append(found)
        return torch.cat(features)


def cached_dataset(
    dataset: ConversationDataset, settings: StageSettings, model: Path, llava: LlavaConfig, rank: int, world_size: int
) -> CachedDataset:
    """`dataset` with features from the cache in `settings.cache_features`, which is filled first with what it lacks."""
    assert settings.cache_features is not None
    vision: Any = llava.vision_config
    layer, tower = feature_layer(llava), load_tower(model, llava, DTYPES[settings.precision])
    identity = cache_identity(tower, dataset.image_processor, layer, settings.precision)
    shape = ((vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    cache = FeatureCache(settings.cache_features, identity, shape)
    tower.to("cuda" if torch.cuda.is_available() else "cpu")
    return CachedDataset(dataset, cache, fill(cache, tower, layer, dataset, settings.workers, rank, world_size))
