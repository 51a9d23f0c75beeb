"""Captions per second of `lift embed` against `SentenceTransformer.encode` at its defaults, on the packaged MiniLM.

    python benchmarks/embedding.py [--captions 2000] [--repeats 5] [--batch-tokens 512 1024]

Captions of mixed length: short and long human captions and web captions below the folder LIFT_DATA, or generated ones where
it is not set. No caption occurs twice, so that nothing is won by embedding repetitions once. Both sides truncate at the
model's 256 tokens and alternate in one process; a ratio is the median of the ratios of the rounds. fp32 is like for like;
bf16 pays where the hardware computes in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from lift.common.files import read_json
from lift.minilm import minilm_folder
from lift.settings import TextEncoderSettings
from lift.text_encoders import load_text_encoder

MAX_LENGTH = 256
WORDS = ["a", "the", "two", "red", "small", "people", "dog", "riding", "standing", "photograph", "mountain", "of", "on"]


def captions(count: int) -> tuple[list[str], str]:
    """`count` distinct captions in random order, and where they come from: 40 % short, 40 % web, 20 % long where data is."""
    draw = random.Random(0)
    if "LIFT_DATA" not in os.environ:
        lengths = [round(min(200, max(3, draw.lognormvariate(2.8, 0.8)))) for _ in range(count)]
        return [f"{' '.join(draw.choices(WORDS, k=length))} {number}" for number, length in enumerate(lengths)], "generated"
    data = Path(os.environ["LIFT_DATA"])
    coco = [row["caption"] for row in read_json(data / "coco" / "captions_val2017.json")["annotations"]]
    web = [row["conversations"][1]["value"] for row in read_json(data / "llava_pretrain" / "blip_laion_cc_sbu_2k.json")]
    parts = {
        "short": draw.sample(sorted(set(coco)), 2 * count // 5),
        "web": draw.sample(sorted(set(web)), min(2 * count // 5, len(set(web)))),
    }
    # all human captions of one image, as long as the captions of Recap-DataComp
    missing = count - sum(map(len, parts.values()))
    parts["long"] = [" ".join(draw.sample(coco, draw.randint(3, 8))) for _ in range(missing)]
    mixed = sorted({caption for part in parts.values() for caption in part})
    draw.shuffle(mixed)
    return mixed, ", ".join(f"{len(part)} {name}" for name, part in parts.items())


def measure(run: Callable[[list[str]], np.ndarray], texts: list[str]) -> float:
    """Captions per second."""
    start = time.perf_counter()
    run(texts)
    return len(texts) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[None], help="budgets to try instead of the default")
    arguments = parser.parse_args()
    texts, source = captions(arguments.captions)
    reference = SentenceTransformer(str(minilm_folder()))
    runs: dict[str, Callable[[list[str]], np.ndarray]] = {"SentenceTransformer.encode": reference.encode}
    for precision in ("fp32", "bf16"):
        for budget in arguments.batch_tokens:
            settings = TextEncoderSettings(max_length=MAX_LENGTH, precision=precision, batch_tokens=budget)
            encoder = load_text_encoder(settings)
            runs[f"lift embed, {precision}{f', {budget} tokens' if budget else ''}"] = encoder.encode
    lengths = np.array(encoder.tokenise(texts).lengths)
    by_characters = lengths[np.argsort([-len(text) for text in texts])]
    batches = [by_characters[start : start + 32] for start in range(0, len(texts), 32)]
    padded = sum(len(batch) * batch.max() for batch in batches) / lengths.sum() - 1
    expected = reference.encode(texts[:64])

    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            rates[name].append(measure(run, texts))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {len(texts)} distinct captions ({source}),")
    print(
        f"{lengths.min()}-{lengths.max()} tokens, median {np.median(lengths):g}; batches of 32 by characters pad {padded:.0%}"
    )
    print(f"{'':<34}{'captions/s':>10}{'ratio':>8}{'largest difference':>20}")
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates["SentenceTransformer.encode"], strict=True)]
        difference = np.abs(runs[name](texts[:64]) - expected).max()
        print(f"{name:<34}{statistics.median(values):>10.0f}{statistics.median(ratios):>8.2f}{difference:>20.1e}")


if __name__ == "__main__":
    main()
