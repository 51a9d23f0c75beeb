"""Likelihood scoring of multiple-choice rows: how probable each option letter is as the token after the prompt.

The logits are those with which generation chooses its first token, so scoring costs no forward pass of its own, and no text is
parsed: the answer is the letter with the highest probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LogitsProcessor

from eval.records import Likelihood
from lift.common.errors import UserError


class FirstStep(LogitsProcessor):
    """Keeps the logits [batch, vocabulary] of the first step of one `generate` call, and changes none."""

    def __init__(self) -> None:
        self.logits: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.logits is None:
            self.logits = scores.detach().clone()
        return scores


def letter_tokens(tokenizer: Any, prompt: str, answered: str, letters: Sequence[str]) -> dict[str, list[int]]:
    """Letter -> ids of the tokens by which a model says it directly after `prompt`.

    There are two spellings, with a space before the letter and without (`ASSISTANT:` is followed by ` A`, a line break by
    `A`); each counts where the tokenizer, having read the prompt, makes one token of it.

    Args:
        answered: `prompt` continued by `letters[0]` as the chat template, and so training, writes an answer.
    Raises:
        UserError: training's own spelling of the letter is more than one token: its first one would not tell the letter.
    """
    start = tokenizer(prompt)["input_ids"]
    spellings = [(letter, text) for letter in letters for text in (letter, f" {letter}")]
    continued = tokenizer([prompt + text for _, text in spellings])["input_ids"]
    ids: dict[str, list[int]] = {letter: [] for letter in letters}
    for (letter, _), tokens in zip(spellings, continued, strict=True):
        if tokens[:-1] == start and tokens[-1] not in ids[letter]:
            ids[letter].append(tokens[-1])
    trained = tokenizer(answered)["input_ids"]
    is_said_first = trained[: len(start)] == start and trained[len(start)] in ids[letters[0]]
    of_all = [token for its_tokens in ids.values() for token in its_tokens]
    if not is_said_first or not all(ids.values()) or len(set(of_all)) < len(of_all):
        following = tokenizer.convert_ids_to_tokens(trained[len(start) : len(start) + 2])
        raise UserError(
            f"likelihood scoring needs option letters of one token each, but this model's answer '{letters[0]}' begins with "
            f"the tokens {following}. Leave it out with --likelihood false."
        )
    return ids


def why_not(folder: Path) -> str:
    """Why the option letters of the LLaVA model in `folder` cannot be scored, in a few words; empty when they can."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    question = {"role": "user", "content": [{"type": "text", "text": "Which?\nA. one\nB. two"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    prompt = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    answered = processor.apply_chat_template([question, answer], tokenize=False)
    try:
        letter_tokens(processor.tokenizer, prompt, answered, "ABCD")
    except UserError:
        return "its tokenizer makes several tokens of an option letter"
    return ""


def log_probabilities(logits: torch.Tensor, ids: dict[str, list[int]]) -> dict[str, float]:
    """Letter -> natural logarithm of the summed probabilities of its spellings, by the softmax over the whole vocabulary.

    Args:
        logits: [vocabulary], of the token after the prompt.
    """
    log_p = logits.float().log_softmax(-1)
    return {letter: float(log_p[its].logsumexp(-1)) for letter, its in ids.items()}


def likelihood(log_p: dict[str, float], answer: Sequence[str]) -> Likelihood:
    """The choice among the letters of `log_p`; the first of several equal ones."""
    prediction = max(log_p, key=lambda letter: log_p[letter])
    return Likelihood(prediction, float(prediction in answer), log_p)
