"""Training speed of LLaVA micro-batches that are padded, grouped by length and modality, or packed.

Lengths come in (by default made up after LLaVA's mix665k); a table goes out: real tokens per second, the share of padding, and
the ratio to padded. Each round takes one optimizer step by each method, one after the other; padded and packed get the same
samples. Figures are medians over rounds, ratios are taken within a round. Steps are those of `lmm train` (samplers,
collators, frozen tower, projector and language model with AdamW) without DeepSpeed, on random weights. On a CPU seconds are
CPU-seconds of the process, so that other jobs matter less.

    python benchmarks/llava_training.py [--scale small|large] [--rounds 3] [--lengths FILE] [--cache] [--out result.json]

`--lengths` takes a JSON list of [tokens, images] per sample; `--cache` adds stage 1 with the tower's features from disk.
`small` is for a CPU: a quarter of the tokens of LLaVA-1.5 everywhere (144 per image, rows of 512). `large` needs a GPU:
576 per image, rows of 2,048, bfloat16, flash-attention where installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss_memory import machine
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from eval.output import format_table
from lift.common.environment import describe_environment
from lift.common.files import read_json, write_json
from lmm.batches import BalancedSampler, Collator, EpochSampler, GroupedSampler
from lmm.conversation import IGNORED_LABEL
from lmm.feature_cache import FeatureCache, take_features, tower_features
from lmm.packing import PackingCollator, attention_of, refuse_leaks, use_packed_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIX = (
    # samples in thousands (LLaVA-1.5, Table 7), images, text tokens: median and sigma of a log-normal (estimates)
    ("LLaVA-Instruct", 158, 1, 260, 0.45),
    ("ShareGPT", 40, 0, 1200, 0.8),
    ("VQAv2", 83, 1, 140, 0.4),
    ("GQA", 72, 1, 290, 0.5),
    ("OKVQA", 9, 1, 75, 0.2),
    ("OCR-VQA", 80, 1, 190, 0.3),
    ("A-OKVQA", 66, 1, 110, 0.2),
    ("TextCaps", 22, 1, 110, 0.3),
    ("RefCOCO", 48, 1, 330, 0.6),
    ("Visual Genome", 86, 1, 400, 0.5),
)
METHODS = ("padded", "grouped", "packed")


@dataclass(frozen=True)
class Scale:
    shrink: int
    """Token counts of LLaVA-1.5 are divided by it."""
    hidden_size: int
    layers: int
    vocabulary: int
    tower_width: int
    tower_layers: int
    batch_size: int
    batches_per_step: int
    dtype: torch.dtype

    @property
    def max_length(self) -> int:
        return 2048 // self.shrink

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return 24 // round(self.shrink**0.5)


SCALES = {
    "small": Scale(4, 320, 8, 8000, 128, 4, 16, 2, torch.float32),
    "large": Scale(1, 2048, 16, 32000, 1024, 24, 16, 2, torch.bfloat16),
}


def mix_lengths(count: int, scale: Scale, seed: int = 0) -> list[tuple[int, int]]:
    """(tokens, images) of samples drawn from MIX, no longer than a row."""
    generator = np.random.default_rng(seed)
    weights = np.array([source[1] for source in MIX], dtype=float)
    drawn = []
    for index in generator.choice(len(MIX), count, p=weights / weights.sum()):
        _, _, images, median, sigma = MIX[index]
        text = median * float(np.exp(generator.normal(0, sigma))) / scale.shrink
        drawn.append((min(scale.max_length, images * scale.grid**2 + max(12, round(text))), images))
    return drawn


def build(scale: Scale) -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=scale.vocabulary, hidden_size=scale.hidden_size, intermediate_size=scale.hidden_size * 43 // 16,
        num_hidden_layers=scale.layers, num_attention_heads=scale.hidden_size // 64, max_position_embeddings=4096,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=scale.tower_width, intermediate_size=4 * scale.tower_width, num_hidden_layers=scale.tower_layers,
        num_attention_heads=scale.tower_width // 64, image_size=14 * scale.grid, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=scale.grid**2)
    flash = DEVICE.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    model: Any = LlavaForConditionalGeneration._from_config(
        config, dtype=scale.dtype, attn_implementation="flash_attention_2" if flash else "sdpa"
    )
    model = model.to(DEVICE)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def make_sample(length: int, images: int, scale: Scale, index: int) -> dict[str, Any]:
    """Random text, of which the second half is supervised; images stand at the front."""
    generator = torch.Generator().manual_seed(index)
    text = torch.randint(10, scale.vocabulary, (length - images * scale.grid**2,), generator=generator).tolist()
    ids = [3] * (images * scale.grid**2) + text
    half = len(ids) - len(text) // 2
    pixels = torch.randn(images, 3, 14 * scale.grid, 14 * scale.grid, generator=generator) if images else None
    return {"input_ids": ids, "labels": [IGNORED_LABEL] * half + ids[half:], "pixel_values": pixels}


def orders(lengths: list[tuple[int, int]], scale: Scale) -> dict[str, list[int]]:
    """The samples in the order of each method; steps of padded and packed have the same samples."""
    tokens, images = [length for length, _ in lengths], [count for _, count in lengths]
    shape = (scale.batch_size, scale.batches_per_step)
    return {
        "padded": list(EpochSampler(len(lengths), 0)),
        "grouped": list(GroupedSampler(tokens, images, 0, *shape)),
        "packed": list(BalancedSampler(EpochSampler(len(lengths), 0), tokens, *shape)),
    }


def collators(scale: Scale, one_row: bool) -> dict[str, Collator]:
    shape = (0, 3, scale.grid**2, (3, 14 * scale.grid, 14 * scale.grid))
    packing = PackingCollator(*shape, max_length=scale.max_length, one_row=one_row)
    return {"padded": Collator(*shape), "grouped": Collator(*shape), "packed": packing}


def step(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]]) -> float:
    """One optimizer step, token-weighted over its micro-batches. Returns its loss."""
    supervised = sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        moved = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        loss = model(**moved, num_items_in_batch=supervised).loss
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return total


def measure(model: Any, samples: list[dict[str, Any]], collate: Collator, scale: Scale) -> dict[str, float]:
    """Seconds (collation included), real tokens and positions of one step; weights stay as they were (learning rate 0)."""
    model.model.vision_tower.eval()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
    synchronize()
    started = clock()
    size = scale.batch_size
    batches = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    loss = step(model, optimizer, batches)
    synchronize()
    return {
        "seconds": clock() - started,
        "tokens": sum(len(sample["input_ids"]) for sample in samples),
        "positions": sum(batch["input_ids"].numel() for batch in batches),
        "loss": loss,
    }


def clock() -> float:
    """Seconds; on a CPU those of this process, which other jobs on the machine change less than they change the time of day."""
    return time.perf_counter() if DEVICE.type == "cuda" else time.process_time()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def compare(scale: Scale, lengths: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    """Per method the median figures of its rounds."""
    model = build(scale)
    own, one_row = attention_of(model), use_packed_attention(model)
    attention = attention_of(model)
    model.eval()
    refuse_leaks(lambda **inputs: model(**inputs).logits, scale.vocabulary, DEVICE, attention)
    model.train()
    by_method, collate = orders(lengths, scale), collators(scale, one_row)
    size = scale.batch_size * scale.batches_per_step
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        for method in METHODS:
            indices = by_method[method][number * size : (number + 1) * size]
            samples = [make_sample(*lengths[index], scale, index) for index in indices]
            model.get_decoder().config._attn_implementation = attention if method == "packed" else own
            figures = measure(model, samples, collate[method], scale)
            if number:  # the first one warms up
                found[method].append(figures)
        if number:
            difference = abs(found["packed"][-1]["loss"] - found["padded"][-1]["loss"])
            assert difference < (1e-4 if scale.dtype == torch.float32 else 2e-2), f"packed and padded loss differ: {difference}"
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "attention": attention}
    speeds = {method: [one["tokens"] / one["seconds"] for one in found[method]] for method in METHODS}
    for method in METHODS:
        ratios = [speed / base for speed, base in zip(speeds[method], speeds["padded"], strict=True)]
        tokens, positions = (sum(one[key] for one in found[method]) for key in ("tokens", "positions"))
        result[method] = {
            "tokens_per_second": statistics.median(speeds[method]),
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "padding": 1 - tokens / positions,
        }
    return result


def compare_cache(scale: Scale, rounds: int, captions: int = 32) -> dict[str, Any]:
    """Seconds of stage 1 (projector only, one image a sample) for `captions` samples: tower run, or features from disk."""
    model, batches = build(scale), []
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    tower, layer = model.model.vision_tower.eval(), -2
    samples = [make_sample(scale.grid**2 + max(8, 30 // scale.shrink), 1, scale, index) for index in range(captions)]
    plain = collators(scale, one_row=False)["padded"]
    cached = Collator(0, 3, scale.grid**2, (scale.grid**2, scale.tower_width))
    forward, seconds = tower.forward, {"tower": [], "cache": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), {}, (scale.grid**2, scale.tower_width))
        started = clock()
        for number, sample in enumerate(samples):
            cache.write(f"{number:04d}", tower_features(tower, sample["pixel_values"], layer)[0])
        filling = clock() - started
        losses: dict[str, float] = {}
        for number in range(rounds + 1):
            for method, collate in (("tower", plain), ("cache", cached)):
                tower.forward = forward
                if method == "cache":
                    take_features(model.config, tower)
                optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
                synchronize()
                started = clock()
                for start in range(0, captions, scale.batch_size):
                    chosen = range(start, min(start + scale.batch_size, captions))
                    batches = [dict(samples[index]) for index in chosen]
                    if method == "cache":
                        for index, sample in zip(chosen, batches, strict=True):
                            features = cache.read(f"{index:04d}")
                            assert features is not None
                            sample["pixel_values"] = features.to(scale.dtype)
                    losses[method] = step(model, optimizer, [collate(batches)])
                synchronize()
                if number:
                    seconds[method].append(clock() - started)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    ratio = statistics.median([one / two for one, two in zip(seconds["tower"], seconds["cache"], strict=True)])
    difference = abs(losses["tower"] - losses["cache"])
    return {"captions": captions, **medians, "fill": filling, "ratio": ratio, "loss_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="large" if DEVICE.type == "cuda" else "small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=Path, help="JSON list of [tokens, images], in place of the made-up mix")
    parser.add_argument("--cache", action="store_true", help="also stage 1 with cached features")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    if arguments.lengths:
        lengths = [(min(tokens, scale.max_length), images) for tokens, images in read_json(arguments.lengths, "lengths")]
    else:
        lengths = mix_lengths(3000, scale)
    result = compare(scale, lengths, arguments.rounds)
    rows = [
        [method, f"{one['tokens_per_second']:.0f}", f"{one['padding']:.1%}", f"{one['ratio']:.2f}", str(one["ratios"])]
        for method, one in ((method, result[method]) for method in METHODS)
    ]
    print(
        f"{machine()}, {torch.get_num_threads()} threads, {result['parameters'] / 1e6:.1f} M parameters, {result['attention']}"
    )
    print(format_table(["", "real tokens/s", "padding", "to padded", "per round"], rows))
    if arguments.cache:
        result["cache"] = compare_cache(scale, arguments.rounds)
        print("stage 1, " + ", ".join(f"{key} {value:.3g}" for key, value in result["cache"].items()))
    if arguments.out:
        write_json(arguments.out, {"scale": arguments.scale, **result, "environment": describe_environment()})


if __name__ == "__main__":
    main()
