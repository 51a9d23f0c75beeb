"""Rows per second of `lift-eval lmm`'s model against lmms-eval's own `llava_hf`, on a LLaVA with random weights.

    python benchmarks/lmm_eval.py [--questions 24] [--batch-size 8] [--tokens 2 16] [--rounds 3] [--image-size 112]

MMBench's form: each question in four circular passes of one image (400 x 300 px), with the prompt of lmms-eval's own task. The
stock model takes one row at a time. Both answer the same rows in turn, in one process and in float32; the ratio is the median
of the rounds. Before, the answers are compared, with the stock model given our pixels: it resizes by torchvision, we by PIL as
LLaVA did, and grey levels apart can turn a word of a model with random weights; how many rows that turns is printed. A trained
model says a letter and stops, which is 2 tokens; 16 is the longest answer that the task allows. Likelihood scoring is on, as
by default. `--size small` has 30 M parameters. An image is 49 tokens at 112 px and 441 at 336 px, where LLaVA-1.5 has 576.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from generation import SIZES, SPECIAL_TOKENS, VOCABULARY, make_model, wrap_tokenizer
from lmms_eval.models.simple.llava_hf import LlavaHf
from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_text, mmbench_doc_to_visual
from loguru import logger
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.lmm.adapter import LiftLlava, TaskJob
from eval.lmm.tasks import LMM_TASKS

TASK = LMM_TASKS["mmbench"]
PROMPT = {"pre_prompt": "", "post_prompt": "\nAnswer with the option's letter from the given choices directly."}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
WORDS = [
    "the",
    "what",
    "which",
    "colour",
    "of",
    "is",
    "in",
    "left",
    "right",
    "above",
    "small",
    "dog",
    "bicycle",
    "table",
    "two",
]


def make_docs(questions: int) -> list[dict[str, Any]]:
    """`questions` times four rows, in MMBench's order: all first passes, then the rotations."""
    draw = random.Random(0)
    docs: list[dict[str, Any]] = []
    for group in range(questions):
        small = Image.frombytes("RGB", (20, 15), draw.randbytes(900))
        image = small.resize((400, 300), Image.Resampling.BICUBIC)
        question = " ".join(draw.choices(WORDS, k=draw.randint(6, 30))) + "?"
        options = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in "ABCD"]
        for rotation in range(4):
            doc = {"index": group + 1_000_000 * rotation, "question": question, "hint": "nan", "image": image, "answer": "A"}
            doc |= dict(zip("ABCD", options[rotation:] + options[:rotation], strict=True))
            docs.append(doc | {"category": "ocr", "L2-category": "", "source": "", "split": "dev"})
    return sorted(docs, key=lambda doc: doc["index"])


def make_tokenizer(docs: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Words are tokens, as in a real tokenizer; also ` A`, which is how an answer begins."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{SYSTEM}USER: {mmbench_doc_to_text(doc, PROMPT)} ASSISTANT: {letter}" for doc in docs for letter in "ABCD"]
    raw.train_from_iterator(texts, trainer)
    return wrap_tokenizer(raw)


def requests_for(docs: list[dict[str, Any]], tokens: int, chat: bool) -> list[Any]:
    """As lmms-eval hands them to a chat model, or to a simple one such as `llava_hf`."""
    requests = []
    for doc_id, doc in enumerate(docs):
        text = mmbench_doc_to_text(doc, PROMPT)
        settings = {"max_new_tokens": tokens, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
        where = (doc_id, TASK.lmms_task, "dev")
        if chat:
            requests.append(SimpleNamespace(args=(text, _messages, settings, *where)))
        else:
            requests.append(SimpleNamespace(args=(text, settings, mmbench_doc_to_visual, *where)))
    return requests


def _messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in mmbench_doc_to_visual(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": mmbench_doc_to_text(doc, PROMPT)}]}]


def answer(model: Any, requests: list[Any]) -> tuple[float, list[str]]:
    """Seconds and the answers."""
    start = time.perf_counter()
    answers = model.generate_until(requests)
    return time.perf_counter() - start, answers


def answer_ours(model: LiftLlava, requests: list[Any], tokens: int) -> tuple[float, list[str]]:
    """The same, with no image's features kept from before, and the answers written to disk as a run writes them."""
    model.__dict__.pop("image_features", None)
    with tempfile.TemporaryDirectory() as folder:
        model.jobs = {TASK.lmms_task: TaskJob(TASK, Path(folder), tokens, likelihood=True)}
        return answer(model, requests)


def require_equal_answers(ours: LiftLlava, stock: Any, docs: list[dict[str, Any]], tokens: int) -> int:
    """How many of the stock model's answers are others on its own pixels. Exits when any is on ours."""
    _, answers = answer_ours(ours, requests_for(docs, tokens, chat=True), tokens)
    _, own = answer(stock, requests_for(docs, tokens, chat=False))
    processor = stock._image_processor
    by_torchvision, processor.image_processor = processor.image_processor, ours.processor.image_processor
    _, expected = answer(stock, requests_for(docs, tokens, chat=False))
    processor.image_processor = by_torchvision
    if differing := sum(a != b for a, b in zip(answers, expected, strict=True)):
        raise SystemExit(f"{differing} of {len(docs)} answers differ from those of llava_hf on the same pixels")
    return sum(a != b for a, b in zip(answers, own, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    docs = make_docs(arguments.questions)
    with tempfile.TemporaryDirectory() as temporary:
        size = SIZES[arguments.size] | {"image_size": arguments.image_size}
        folder = make_model(Path(temporary), **size, tokenizer=make_tokenizer(docs))
        ours = LiftLlava(str(folder), dtype="float32", device=arguments.device, batch_size=arguments.batch_size)
        stock = LlavaHf(str(folder), dtype="float32", device=arguments.device, device_map=arguments.device)
        parameters = sum(weight.numel() for weight in ours.model.parameters()) / 1e6
        ours.task_dict = stock.task_dict = {TASK.lmms_task: {"dev": docs}}
        answer(stock, requests_for(docs[:2], 2, chat=False))  # warm up
        answer_ours(ours, requests_for(docs[: arguments.batch_size], 2, chat=True), 2)
        rows = []
        for tokens in arguments.tokens:
            turned = require_equal_answers(ours, stock, docs, tokens)
            ratios, ours_per_second, stock_per_second = [], [], []
            for _ in range(arguments.rounds):
                stock_seconds, _ = answer(stock, requests_for(docs, tokens, chat=False))
                seconds, _ = answer_ours(ours, requests_for(docs, tokens, chat=True), tokens)
                ratios.append(stock_seconds / seconds)
                ours_per_second.append(len(docs) / seconds)
                stock_per_second.append(len(docs) / stock_seconds)
            rows.append((tokens, statistics.median(stock_per_second), statistics.median(ours_per_second), ratios, turned))
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{platform.machine()} CPU"
    facts = f"{torch.get_num_threads()} threads, {parameters:.0f} M parameters, images of {arguments.image_size} px, float32"
    print(f"{where}, {facts}, {len(docs)} rows, all answers equal on equal pixels")
    batch = arguments.batch_size
    print(f"| tokens | llava_hf, rows/s | lift_llava, batch {batch}, rows/s | ratio (rounds) | turned by resizing |")
    print("| --- | --- | --- | --- | --- |")
    for tokens, slow, fast, ratios, turned in rows:
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {tokens} | {slow:.2f} | {fast:.2f} | {statistics.median(ratios):.2f} ({rounds}) | {turned} |")


if __name__ == "__main__":
    main()
