"""Tensors of a checkpoint folder, one file at a time: single or sharded, safetensors or PyTorch's pickles without code.

In: a folder with `model.safetensors`, `pytorch_model.bin` or an index of shards, or one file. Out: dictionaries of CPU tensors.
No more than one shard is in memory, and a pickle that would run code is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lift.common.errors import UserError, first_line
from lift.common.files import read_json, require_file, write_json

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = SAFETENSORS + ".index.json"
Tensors = dict[str, torch.Tensor]


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of `folder`; empty when there are none.

    Raises:
        UserError: an index names a shard that is not there.
    """
    for name in (SAFETENSORS, PICKLE):
        if (folder / f"{name}.index.json").is_file():
            shards = read_json(folder / f"{name}.index.json", "an index of weight files").get("weight_map", {})
            return [
                require_file(folder / shard, f"the shard that {name}.index.json names") for shard in sorted({*shards.values()})
            ]
        if (folder / name).is_file():
            return [folder / name]
    return []


def read_tensors(file: Path) -> Tensors:
    """All tensors of one file, on the CPU, in their own dtypes.

    Raises:
        UserError: the file is cut off, holds something else than named tensors, or is a pickle with code in it.
    """
    require_file(file, "a file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: expected a pickle with tensors only, found one that would run code, or a damaged one; it is not opened. "
            "Get the checkpoint as safetensors from a source you trust."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read, perhaps cut off: {first_line(error)}. Copy it again.") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"{file}: expected a dictionary of named tensors, found {type(tensors).__name__} with other content.")
    return tensors


def read_all(folder: Path) -> Iterator[Tensors]:
    for file in weight_files(folder):
        yield read_tensors(file)


class ShardWriter:
    """Writes tensors as the shards of one safetensors model; a model of one shard gets the plain name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: Tensors) -> None:
        """Writes one shard. Tensors are made contiguous and stand for themselves, as safetensors wants it."""
        if not tensors:
            return
        own = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        save_file(own, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(own))
        self.shapes |= {key: value.shape for key, value in own.items()}
        self.dtypes |= {key: value.dtype for key, value in own.items()}
        self._bytes += sum(value.numel() * value.element_size() for value in own.values())

    def close(self) -> None:
        """Gives the shards their final names and writes the index."""
        if len(self._shards) == 1:
            self._path(0).rename(self.folder / SAFETENSORS)
            return
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._path(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX, index)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"
