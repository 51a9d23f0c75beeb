"""Peak memory and time of the contrastive loss, forward and backward: tiled (`lift.losses`) against the plain B x B formula.

Sizes come in by the command line, a table goes out. Each cell runs in a process of its own. Memory is what comes on top of
the features: on a CPU the peak resident set, on a GPU the peak of the allocator. A cell that would not fit is left out.

    python benchmarks/loss_memory.py [--batch-sizes 4096 16384 32768] [--dimensions 512 4096] [--tile 1024]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lift.losses import contrastive_loss, start_gather
from lift.losses.tiles import DEFAULT_TILE

MIB = 2**20
PLAIN_MATRICES = 6  # B x B float32 at once: the logits, two log-softmaxes, their gradients; and some room
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def features(batch_size: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    image_BD, text_BD = (F.normalize(torch.randn(batch_size, dimension, device=DEVICE), dim=-1) for _ in range(2))
    return image_BD.requires_grad_(), text_BD, torch.tensor([3.0], device=DEVICE, requires_grad=True)


def plain(image_BD: Tensor, text_BD: Tensor, log_scale_1: Tensor, tile: int) -> None:
    logits_BB, own_B = log_scale_1.exp() * image_BD @ text_BD.T, torch.arange(len(image_BD), device=DEVICE)
    ((F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2).backward()


def tiled(image_BD: Tensor, text_BD: Tensor, log_scale_1: Tensor, tile: int) -> None:
    valid_B = torch.ones(len(image_BD), dtype=torch.bool, device=DEVICE)
    contrastive_loss(image_BD, start_gather(text_BD, valid_B).wait(), log_scale_1, tile=tile).backward()


def kib_of(file: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def measure(method: str, batch_size: int, dimension: int, tile: int) -> dict[str, float]:
    """Seconds, and peak bytes beyond the features, of one forward and backward pass."""
    run = {"plain": plain, "tiled": tiled}[method]
    run(*features(256, dimension), tile)  # libraries, threads
    inputs = features(batch_size, dimension)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        before = kib_of("/proc/self/status", "VmRSS") * 1024
    start = time.perf_counter()
    run(*inputs, tile)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else kib_of("/proc/self/status", "VmHWM") * 1024
    return {"seconds": seconds, "bytes": peak - before}


def measure_apart(method: str, batch_size: int, dimension: int, tile: int) -> dict[str, float] | None:
    """In a process of its own; None where the plain formula would need more than the free memory."""
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else kib_of("/proc/meminfo", "MemAvailable") * 1024
    if method == "plain" and 4 * (PLAIN_MATRICES * batch_size**2 + 4 * batch_size * dimension) > free:
        return None
    cell = json.dumps([method, batch_size, dimension, tile])
    # a tile that is returned goes back to the system, so that the peak is what is in use and not what malloc keeps
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--cell", cell]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def machine() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--tile", type=int, default=DEFAULT_TILE, help="rows and columns of a tile of logits")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell)))
        return
    print(f"torch {torch.__version__}, {machine()}, float32, tile {arguments.tile}")
    headers = ("D", "B", "plain MiB", "tiled MiB", "tiled KiB/row", "plain s", "tiled s", "tiled/plain")
    print("  ".join(f"{header:>9}" for header in headers))
    for dimension in arguments.dimensions:
        for batch_size in arguments.batch_sizes:
            of_plain, of_tiled = (measure_apart(m, batch_size, dimension, arguments.tile) for m in ("plain", "tiled"))
            assert of_tiled is not None
            row: dict[str, str | int] = dict.fromkeys(headers, "-") | {"D": dimension, "B": batch_size, "plain MiB": "no room"}
            row["tiled MiB"] = f"{of_tiled['bytes'] / MIB:.0f}"
            row["tiled KiB/row"] = f"{of_tiled['bytes'] / batch_size / 1024:.1f}"
            row["tiled s"] = f"{of_tiled['seconds']:.2f}"
            if of_plain is not None:
                row["plain MiB"], row["plain s"] = f"{of_plain['bytes'] / MIB:.0f}", f"{of_plain['seconds']:.2f}"
                row["tiled/plain"] = f"{of_tiled['seconds'] / of_plain['seconds']:.2f}"
            print("  ".join(f"{row[header]:>{max(9, len(header))}}" for header in headers), flush=True)


if __name__ == "__main__":
    main()
