"""Answers per second of batched generation against batch size 1, on a LLaVA with random weights.

    python benchmarks/generation.py [--device cpu] [--questions 24] [--tokens 32] [--batch-size 8] [--repeats 3]

Questions of mixed length, three in four with an image; every answer has `--tokens` tokens (random weights never end one), so
that both sides do the same work. Both alternate in one process; the ratio is the median of the rounds' ratios. In float32 the
answers are compared too. `--size small` has 30 M parameters (CPU), `--size 1b` about a billion (GPU).
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lmm.build import build
from lmm.inference import Answer, Decoding, Llava, Question, longest_first
from lmm.settings import BuildSettings

SIZES = {"small": {"width": 384, "layers": 8, "vision_layers": 6}, "1b": {"width": 2048, "layers": 18, "vision_layers": 24}}
VOCABULARY = 8192
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<image>"]


def wrap_tokenizer(raw: Tokenizer) -> PreTrainedTokenizerFast:
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", additional_special_tokens=["<image>"]
    )


def make_model(
    folder: Path,
    width: int,
    layers: int,
    vision_layers: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
    image_size: int = 112,
) -> Path:
    """A CLIP tower (49 image tokens at 112 px), a Llama and a tokenizer (of bytes when left out), joined by `lmm build`."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=vision_layers, num_attention_heads=width // 64,
        image_size=image_size, patch_size=16,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    crop = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(folder / "tower")
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(folder / "llm")
    words = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    by_bytes = Tokenizer(models.BPE({token: number for number, token in enumerate(words)}, merges=[]))
    (tokenizer or wrap_tokenizer(by_bytes)).save_pretrained(folder / "llm")
    parts = {"vision_tower": folder / "tower", "llm": folder / "llm", "chat_template": "vicuna_v1"}
    return build(BuildSettings(**parts, out=folder / "llava"))  # type: ignore[arg-type]


def make_questions(model: Llava, count: int, tokens: int) -> list[Question]:
    draw = random.Random(0)
    questions = []
    for number in range(count):
        text = "q" * draw.randint(10, 120)
        images = [Image.new("RGB", (150, 120), (number * 9 % 256, 90, 40))] if number % 4 else []
        questions.append(model.question([{"role": "user", "content": "<image>\n" * len(images) + text}], images, tokens))
    return questions


def answer_all(model: Llava, questions: list[Question], batch_size: int, tokens: int) -> tuple[float, list[Answer]]:
    """Seconds, and the answers in the order of the questions."""
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    for batch in longest_first([len(question.input_ids) for question in questions], batch_size):
        answers.update(zip(batch, model.answer([questions[place] for place in batch], Decoding(tokens)), strict=True))
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, [answers[place] for place in range(len(questions))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Llava(make_model(Path(folder), **SIZES[arguments.size]), arguments.dtype, arguments.device)
    model.ends = []
    model.model.generation_config.eos_token_id = None
    questions = make_questions(model, arguments.questions, arguments.tokens)
    answer_all(model, questions[: arguments.batch_size], arguments.batch_size, 2)  # warm up
    ratios, singles, batched = [], [], []
    for _ in range(arguments.repeats):
        single, one = answer_all(model, questions, 1, arguments.tokens)
        together, many = answer_all(model, questions, arguments.batch_size, arguments.tokens)
        if arguments.dtype == "float32" and one != many:
            raise SystemExit("answers in batches differ from those of batch size 1")
        ratios.append(single / together)
        singles.append(len(questions) / single)
        batched.append(len(questions) / together)
    parameters = sum(weight.numel() for weight in model.model.parameters()) / 1e6
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{where}, {torch.get_num_threads()} threads, {parameters:.0f} M parameters, {arguments.dtype}")
    print(f"batch size 1: {statistics.median(singles):.2f} answers/s of {arguments.tokens} tokens")
    print(f"batch size {arguments.batch_size}: {statistics.median(batched):.2f} answers/s")
    print(f"ratio {statistics.median(ratios):.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
