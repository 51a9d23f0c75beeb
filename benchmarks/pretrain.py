"""Training speed and memory of LIFT and of the CLIP baseline at captions of 77, 128 and 323 tokens, as `lift pretrain` trains.

JPEGs in tars come in (photo-like ones are made where none are given; embeddings are always made up, and captions are repeated
until they fill their n tokens); a table goes out. Each cell is a process of its own: first steps on one batch in memory,
which tell the model's speed and memory, then steps on the real loader. LIFT's cell has no n: its text side is a row of the
embedding store. Rounds alternate between the cells; figures are medians over rounds, ratios are taken within a round.

    python benchmarks/pretrain.py [--scale small|paper] [--data DIR_OF_TARS] [--options] [--rounds 3] [--out result.json]

Peak memory is that of the steps in memory, beyond what the imported libraries take: on a GPU the peak of the allocator, on a
CPU the peak resident set, torch.compile's own included. MFU is against the measured peak of matrix products in the precision
of the cell. Data wait is the time that the host waits; a GPU may still be at work on the step before, so it is an upper bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from image_pipeline import make_photos
from loss_memory import kib_of, machine
from torch import Tensor

from eval.output import format_table
from lift.common.environment import describe_environment
from lift.common.files import write_json
from lift.common.ledger import DropLedger
from lift.data import Batch, Pairs, make_loader
from lift.flops import matrix_peak, training_flops
from lift.model import ClipModel, LiftModel, build_clip, build_lift, parameter_groups
from lift.settings import ClipTextSettings, PretrainSettings, SourceSettings, VisionSettings
from lift.sources import Samples, read_sources
from lift.step import TrainingStep
from lift.store import EmbeddingStore, StoreWriter
from lift.text_side import FixedTextSide, TrainedTextSide, clip_tokenizer
from lift.transforms import fitted_transform

MIB = 2**20
PHOTOS = 256
"""Distinct JPEGs that are made; each stands in the tar under several keys."""
CAPTION_WORDS = 60


@dataclasses.dataclass(frozen=True)
class Scale:
    vision: VisionSettings
    clip_text: ClipTextSettings
    dimension: int
    """Of the text embeddings."""
    precision: str
    batch_size: int
    steps: int


SCALES = {
    # the paper's shapes with a quarter of the width and half of the layers, so that towers keep their proportions
    "small": Scale(
        VisionSettings(image_size=112, patch_size=8, width=192, layers=6, heads=3),
        ClipTextSettings(width=128, layers=6, heads=2, embedding_dim=128, vocabulary_size=2000),
        dimension=384,
        precision="fp32",
        batch_size=16,
        steps=3,
    ),
    "paper": Scale(VisionSettings(), ClipTextSettings(), dimension=4096, precision="bf16", batch_size=256, steps=20),
}


class FilledCaptions(TrainedTextSide):
    """Repeats each caption until it fills the context."""

    def tokenise(self, captions: list[str]) -> dict[str, Tensor]:
        words = [caption.split() or ["a"] for caption in captions]  # a word is one token at least
        return super().tokenise([" ".join(own * math.ceil(self.context_length / len(own))) for own in words])


@dataclasses.dataclass
class Training:
    """One model in training, by the steps of `lift pretrain` without its schedule, logs and checkpoints."""

    settings: PretrainSettings
    accelerator: Accelerator
    model: LiftModel | ClipModel

    def __post_init__(self) -> None:
        wrapped = self.accelerator.prepare_model(self.model)
        self.gradients = TrainingStep(self.settings, self.accelerator, self.model, wrapped)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.settings.weight_decay), lr=1e-4)

    def step(self, number: int, batch: Batch) -> Tensor:
        loss = self.gradients(number, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def in_memory(self, batch: Batch, steps: int) -> float:
        """Seconds of `steps` steps on the same batch."""
        for number in range(2):  # the optimiser's state is made in the first, a compiled model settles in the second
            self.step(number, batch)
        self.synchronise()
        start = time.perf_counter()
        for number in range(steps):
            loss = self.step(number, batch)
        self.synchronise()
        assert math.isfinite(float(loss))
        return time.perf_counter() - start

    def from_loader(self, batches: Iterator[Batch], first: int, steps: int) -> tuple[float, float]:
        """Seconds of `steps` steps after the `first` ones, and those of them that were spent waiting for a batch."""
        for number in range(first):
            self.step(number, next(batches))
        self.synchronise()
        start, waited = time.perf_counter(), 0.0
        for number in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            assert not batch.faults, batch.faults[0]
            self.step(number, batch)
        self.synchronise()
        return time.perf_counter() - start, waited

    def synchronise(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def measure(settings: PretrainSettings, steps: int) -> dict[str, float | None]:
    """The figures of one cell."""
    ledger = DropLedger()
    samples = Samples(read_sources(settings.data, ledger))
    length = settings.clip_text.context_length
    if settings.objective == "clip":
        tokenizer = clip_tokenizer(settings.clip_text, [])
        text_side: FilledCaptions | FixedTextSide = FilledCaptions(tokenizer, length)
        flops = training_flops(settings.vision, settings.clip_text.embedding_dim, settings.clip_text, length)
    else:
        assert settings.embeddings is not None
        store = EmbeddingStore(settings.embeddings)
        text_side, flops = FixedTextSide(store, samples, ledger), training_flops(settings.vision, store.dimension, None)

    def loader(count: int) -> Iterator[Batch]:
        return iter(make_loader(Pairs(samples, settings), settings, text_side, range(count), 0, 1))

    batch = next(loader(1))
    assert batch.valid_B.all(), "a sample of the first batch cannot be used"
    if settings.objective == "clip":
        assert int(batch.text["attention_mask"].sum()) == settings.batch_size * length, "captions do not fill their tokens"
    bf16 = settings.precision == "bf16"
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not torch.cuda.is_available())
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    peak = matrix_peak(accelerator.device, torch.bfloat16 if bf16 else torch.float32)
    before = start_memory()
    batch = dataclasses.replace(
        batch,
        pixels_B3HW=batch.pixels_B3HW.to(accelerator.device),
        text={name: tensor.to(accelerator.device) for name, tensor in batch.text.items()},
        valid_B=batch.valid_B.to(accelerator.device),
    )
    if settings.objective == "clip":
        model: LiftModel | ClipModel = build_clip(settings, tokenizer)
    else:
        model = build_lift(settings, fitted_transform(store, settings.text_transform, settings.seed))
    training = Training(settings, accelerator, model)
    seconds = training.in_memory(batch, steps)
    memory = peak_memory() - before
    first = max(1, settings.workers)  # past the workers' start, and not so far that they have filled their queues for the rest
    loaded_seconds, waited = training.from_loader(loader(first + steps), first, steps)
    trained = steps * settings.batch_size
    counted = settings.patch_dropout == 0  # the formula is for all patches
    return {
        "samples_per_second": trained / seconds,
        "mfu": trained * flops / seconds / peak if counted else None,
        "loaded_samples_per_second": trained / loaded_seconds,
        "loaded_mfu": trained * flops / loaded_seconds / peak if counted else None,
        "data_wait_share": waited / loaded_seconds,
        "peak_bytes": memory,
        "matrix_peak_flops": peak,
        "flops_per_sample": flops,
    }


def start_memory() -> int:
    """Bytes in use; `peak_memory` counts from here."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    return kib_of("/proc/self/status", "VmRSS") * 1024


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else kib_of("/proc/self/status", "VmHWM") * 1024


def make_inputs(folder: Path, scale: Scale, tars: Path | None, batch_size: int) -> None:
    """Tars of pairs where none are given, a store of random embeddings, and a tokenizer.

    There are as many words as fill its vocabulary when most of them become one token.
    """
    random = np.random.default_rng(0)
    letters = random.integers(ord("a"), ord("z") + 1, (3 * scale.clip_text.vocabulary_size // 8, 7), dtype=np.uint8)
    words = [row.tobytes().decode() for row in letters]
    clip_tokenizer(scale.clip_text, words).save_pretrained(folder / "tokenizer")
    if tars is None:
        photos = [photo.read() for photo in make_photos(folder, PHOTOS)]
        (folder / "pairs").mkdir()
        with tarfile.open(folder / "pairs" / "00000.tar", "w") as archive:
            for number in range(max(4 * batch_size, PHOTOS)):
                caption = " ".join(random.choice(words, CAPTION_WORDS))
                for suffix, content in (("jpg", photos[number % PHOTOS]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    store = StoreWriter(folder / "store", {"kind": "benchmark"}, scale.dimension)
    shards = read_sources([source(folder, tars)], DropLedger())
    for shard in shards:
        keys, captions = zip(*shard.keyed_captions(), strict=True)
        embeddings_ND = random.standard_normal((len(keys), scale.dimension), dtype=np.float32)
        store.write_shard(shard.name, keys, captions, embeddings_ND)
    store.finish([shard.name for shard in shards])


def source(folder: Path, tars: Path | None) -> SourceSettings:
    return SourceSettings(kind="webdataset", path=str(tars or folder / "pairs"), index=folder / "index")


def cell_settings(options: argparse.Namespace, folder: Path, changes: dict[str, Any]) -> PretrainSettings:
    """Settings of the plain run, changed; `tokens` is the length of CLIP's captions."""
    scale = SCALES[options.scale]
    tokens = changes.get("tokens", scale.clip_text.context_length)
    settings = PretrainSettings(
        data=[source(folder, options.data)],
        out=folder / "run",
        embeddings=folder / "store",
        vision=scale.vision,
        clip_text=dataclasses.replace(scale.clip_text, context_length=tokens, tokenizer=folder / "tokenizer"),
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        compile=options.compile,
        workers=options.workers,
    )
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if name != "tokens"})


def cells(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of each row, and what is changed in the plain run; the first row is what the others are compared with."""
    rows: dict[str, dict[str, Any]] = {"LIFT": {}}
    rows |= {f"CLIP, n = {tokens}": {"objective": "clip", "tokens": tokens} for tokens in options.tokens}
    if options.options:
        effects: dict[str, Any] = {
            "precision": "fp32" if options.precision == "bf16" else "bf16",
            "gradient_checkpointing": not options.gradient_checkpointing,
            "compile": not options.compile,
            "patch_dropout": 0.5,
            "micro_batch_size": options.batch_size // 2,
        }
        rows |= {f"LIFT, {name} {value}": {name: value} for name, value in effects.items()}
    return rows


def measure_apart(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own, which reads the same command line; what went wrong, if it did, so that the others still run."""
    command = [sys.executable, *sys.argv, "--folder", str(folder), "--cell", json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each row the medians over `rounds`, the largest peak, and `time_ratio` and `memory_ratio` to the first row."""
    summary: dict[str, dict[str, Any]] = {}
    base = next(iter(rounds[0]))
    for name in rounds[0]:
        found = [results[name] for results in rounds]
        failed = [result for result in found if "failed" in result]
        if failed:
            summary[name] = failed[0]
            continue
        row = {key: None if found[0][key] is None else statistics.median(r[key] for r in found) for key in found[0]}
        row["peak_bytes"] = max(result["peak_bytes"] for result in found)
        if "failed" not in summary.get(base, row):
            rates = [(results[base]["samples_per_second"], results[name]["samples_per_second"]) for results in rounds]
            row["time_ratio"] = statistics.median(plain / changed for plain, changed in rates)
            row["memory_ratio"] = row["peak_bytes"] / summary.get(base, row)["peak_bytes"]
        summary[name] = row
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    columns = {
        "samples/s": ("samples_per_second", "{:.1f}"),
        "MFU": ("mfu", "{:.1%}"),
        "peak MiB": ("peak_mib", "{:.0f}"),
        "time": ("time_ratio", "{:.2f}"),
        "memory": ("memory_ratio", "{:.2f}"),
        "loaded samples/s": ("loaded_samples_per_second", "{:.1f}"),
        "loaded MFU": ("loaded_mfu", "{:.1%}"),
        "data wait": ("data_wait_share", "{:.1%}"),
    }
    lines = []
    for name, row in summary.items():
        shown = row if "failed" in row else row | {"peak_mib": row["peak_bytes"] / MIB}
        lines.append([name, *("-" if shown.get(key) is None else form.format(shown[key]) for key, form in columns.values())])
    failures = [f"{name}: {row['failed']}" for name, row in summary.items() if "failed" in row]
    return "\n".join([format_table(["", *columns], lines), *failures])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--data", type=Path, help="folder of tars in img2dataset's layout, or one tar; made when left out")
    parser.add_argument("--tokens", type=int, nargs="*", default=[77, 128, 323], help="caption lengths of the CLIP rows")
    parser.add_argument("--options", action="store_true", help="add rows of LIFT with one setting changed")
    parser.add_argument("--steps", type=int, help="timed steps of each of both runs of a cell")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of all figures, written after each round")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    scale = SCALES[options.scale]
    for name in ("steps", "batch_size", "precision"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(scale, name))
    return options


def main() -> None:
    options = parse()
    if options.cell is not None:
        print(json.dumps(measure(cell_settings(options, options.folder, options.cell), options.steps)))
        return
    environment = describe_environment()
    versions = ", ".join(f"{name} {environment['versions'].get(name)}" for name in ("python", "torch", "transformers"))
    print(f"{machine()}; {os.cpu_count()} CPUs; {versions}")
    print(
        f"{options.scale}: {options.precision}, batch {options.batch_size}, {options.steps} steps, {options.rounds} rounds, "
        f"{options.workers} workers, images {options.data or 'made'}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        make_inputs(folder, SCALES[options.scale], options.data, options.batch_size)
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(options.rounds):
            results: dict[str, dict[str, Any]] = {}
            for name, changes in cells(options).items():
                results[name] = measure_apart(folder, changes)
                print(f"round {number + 1}, {name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
            rounds.append(results)
            if options.out:
                facts = {"machine": machine(), "environment": environment, "command": sys.argv[1:]}
                write_json(options.out, {**facts, "summary": summarise(rounds), "rounds": rounds})
    summary = summarise(rounds)
    row = next((row for row in summary.values() if "failed" not in row), None)
    if row:
        print(f"matrix peak {row['matrix_peak_flops'] / 1e12:.3g} TFLOP/s; time and memory are ratios to the first row")
    print("\n" + table(summary))
    if any("failed" in row for row in summary.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
