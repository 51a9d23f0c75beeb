"""A LLaVA folder loaded to answer: prompts as training renders them, batches padded on the left, answers as text or streamed.

`lmm generate`, `lmm chat`, `lmm serve` and lmms-eval's adapter all generate through this module.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
)

from lift.common.errors import UserError
from lift.common.files import read_json, require_folder
from lmm.adapters import BASE
from lmm.conversation import ConversationEncoder, SampleFault


class Question(NamedTuple):
    """A prompt ready for the model: its ids, in which every feature of an image has a token, and the images in that order."""

    input_ids: list[int]
    images: list[Image.Image]


class Answer(NamedTuple):
    text: str
    cut: bool
    """Whether it was cut at the longest length allowed."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen. At temperature 0 the likeliest token is; above, tokens are drawn from `seed`."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def torch_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one. Raises UserError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:NUMBER.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here. Give --device cpu.")
    return device


def number_format(dtype: str, device: torch.device) -> str:
    """`auto` is float32 on a CPU; elsewhere it stays, which is the folder's own format."""
    return "float32" if dtype == "auto" and device.type == "cpu" else dtype


def load_whole(folder: Path, dtype: str) -> Any:
    """A LlavaForConditionalGeneration in evaluation mode.

    Raises:
        UserError: it cannot be loaded, or a weight is missing or misshapen and would run at random.
    """
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    if wrong := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise UserError(f"{folder}: weights missing or of another shape, which would run at random: {', '.join(wrong[:3])}.")
    return model.eval()


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's and those of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted(ends - {None})


def longest_first(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of like length: little padding, and what does not fit into memory fails at once, not at the end."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Llava:
    """A LLaVA model with its processor.

    Args:
        folder: LLaVA folder as `lmm` writes it, or any other that plain transformers runs.
        dtype: `float32`, `bfloat16`, or `auto`: float32 on a CPU, the folder's own format on a GPU.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
    Raises:
        UserError: no whole LLaVA folder, no chat template, or no such device.
    """

    def __init__(self, folder: Path, dtype: str = "auto", device: str = "auto") -> None:
        self.folder = folder
        self.device = torch_device(device)
        check_is_llava(folder)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(
                folder, local_files_only=True, backend="pil", trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder}: expected the processor of a LLaVA model: {_first_line(error)}") from error
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model: Any = load_whole(folder, number_format(dtype, self.device))
        self.model.to(self.device)
        self.ends = end_tokens(self.model, tokenizer)
        # Every choice is ours: penalties that a model's own configuration asks for would also count the padding of a batch.
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends or None, pad_token_id=tokenizer.pad_token_id)
        config = self.model.config
        self.context: int = getattr(config.text_config, "max_position_embeddings", None) or 2**31
        template = self.processor.chat_template or tokenizer.chat_template
        if not isinstance(template, str):
            raise UserError(f"{folder}: expected a chat template (chat_template.jinja), found none. Train with one.")
        self.encoder = ConversationEncoder(
            tokenizer, template, str(folder), self.processor.image_token, _features(config), self.context
        )

    def question(self, messages: list[dict[str, str]], images: list[Image.Image], max_new_tokens: int) -> Question:
        """The prompt for the answer that follows `messages`.

        Args:
            messages: `role` and `content`; `<image>` marks where each of `images` stands.
        Raises:
            SampleFault: the template refuses them, or prompt and answer together exceed what the model takes.
        """
        input_ids = self.encoder.prompt_ids(messages)
        if len(input_ids) + max_new_tokens > self.context:
            raise SampleFault(
                "too long",
                f"{len(input_ids)} tokens and an answer of up to {max_new_tokens} are more than the {self.context} "
                "that the model takes",
            )
        return Question(input_ids, images)

    def answer(self, questions: list[Question], decoding: Decoding, draws: list[int] | None = None) -> list[Answer]:
        """Answers one batch. In float32 each is what the question alone would get.

        Args:
            draws: per question, a number that with `decoding.seed` fixes what is drawn; its position when left out.
        """
        with torch.inference_mode():
            tokens_BT = self.model.generate(
                **self._inputs(questions), **self._settings(decoding, draws or list(range(len(questions))))
            )
        new_tokens_BT = tokens_BT[:, max(len(question.input_ids) for question in questions) :].tolist()
        return [self._read(tokens, decoding.max_new_tokens) for tokens in new_tokens_BT]

    def stream(self, question: Question, decoding: Decoding) -> Generator[str]:
        """The answer in pieces as it grows. Closing the iterator (or an exception in its consumer) stops the model."""
        pieces: Any = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = threading.Event(), []

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **self._inputs([question]),
                        **self._settings(decoding, [len(question.input_ids)]),
                        streamer=pieces,
                        stopping_criteria=[_StopWhenSet(stop)],
                    )
            except Exception as error:  # raised again in the thread that reads; here it would only be printed
                errors.append(error)
                pieces.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in pieces if piece)
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]

    def _inputs(self, questions: list[Question]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`: int64 [batch, length], padded on the left; `pixel_values`: [images, 3, H, W]."""
        length = max(len(question.input_ids) for question in questions)
        input_ids_BT = torch.full((len(questions), length), self.processor.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, question in enumerate(questions):
            input_ids_BT[row, length - len(question.input_ids) :] = torch.tensor(question.input_ids)
            mask_BT[row, length - len(question.input_ids) :] = 1
        inputs = {"input_ids": input_ids_BT.to(self.device), "attention_mask": mask_BT.to(self.device)}
        if images := [image for question in questions for image in question.images]:
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(self.device, self.model.dtype)
        return inputs

    def _settings(self, decoding: Decoding, draws: list[int]) -> dict[str, Any]:
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": decoding.max_new_tokens}
        if decoding.temperature:
            settings["logits_processor"] = [DrawTokens(decoding.temperature, decoding.seed, draws)]
        return settings

    def _read(self, tokens: list[int], max_new_tokens: int) -> Answer:
        cut = len(tokens) == max_new_tokens and not set(self.ends).intersection(tokens)
        return Answer(self.processor.tokenizer.decode(tokens, skip_special_tokens=True), cut)


class DrawTokens(LogitsProcessor):
    """Sampling as greedy choice among perturbed logits (the Gumbel-max trick), each row with its own generator.

    What a row draws therefore depends on its own number alone, not on the other rows of its batch.
    """

    def __init__(self, temperature: float, seed: int, draws: list[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + draw) % 2**63) for draw in draws]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: logits [batch, vocabulary]; returned perturbed in float32."""
        uniform_BV = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self.generators])
        gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + gumbel_BV.to(scores.device)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


def check_is_llava(folder: Path) -> None:
    """Raises UserError, without loading anything."""
    if (folder / BASE).is_file():
        raise UserError(f"{folder}: holds adapters, not a whole model. Merge them first: lmm merge {folder}")
    config = read_json(require_folder(folder, "a LLaVA folder") / "config.json", "the configuration of a LLaVA folder")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "llava":
        raise UserError(
            f"{folder}/config.json: expected model_type 'llava', found '{model_type}'. Give the folder that `lmm train` wrote "
            "(an original LLaVA checkpoint: `lmm import` first)."
        )


def _features(config: Any) -> int:
    """Image tokens per image: the patches, and the class token where the model keeps it."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
