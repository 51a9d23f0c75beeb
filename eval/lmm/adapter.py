"""A LLaVA folder as an lmms-eval model: chat requests come in, answers go out, in batches.

The stock `llava_hf` answers one request at a time and turns an error into an empty answer; this adapter batches by length with
left padding, gives the same answers (in float32), takes text-only rows, honours `until` and lets every error through.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

from eval.lmm.plugin import PROGRESS, clean_answer
from lmm.inference import end_tokens, load_whole, longest_first


class LiftLlava(lmms):
    """`--model lift_llava --model_args pretrained=FOLDER[,dtype=float32|bfloat16|auto] --batch_size N --device cpu|cuda`."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = int(batch_size)
        self.model: Any = load_whole(Path(pretrained), dtype)
        self.model.to(self.device)
        self.processor = AutoProcessor.from_pretrained(pretrained, backend="pil")
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token_id is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token

    def clean(self) -> None:
        """The base class deletes the model's modules after a run; this object may be used again."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lift_llava answers generate_until tasks; use stock llava_hf for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("lift_llava answers generate_until tasks; use stock llava_hf for several rounds")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers in the order of `requests`. Settings of one request never reach another: batches share theirs."""
        positions_by_settings: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            positions_by_settings[repr(sorted(request.args[2].items()))].append(position)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc=PROGRESS) as progress:
            for positions in positions_by_settings.values():
                for places in longest_first([len(requests[p].args[0]) for p in positions], self.batch_size):
                    batch = [positions[place] for place in places]
                    answers.update(zip(batch, self._answer([requests[p] for p in batch]), strict=True))
                    progress.update(len(batch))
        return [answers[position] for position in range(len(requests))]

    def _answer(self, batch: list[Instance]) -> list[str]:
        prompts, images = [], []
        for request in batch:
            prompt, its_images = self._render(request)
            prompts.append(prompt)
            images.extend(its_images)
        inputs = self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        settings = batch[0].args[2]
        with torch.inference_mode():
            tokens_BT = self.model.generate(**inputs, **self._generation_settings(settings))
        new_tokens_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new_tokens_BT, skip_special_tokens=True)
        return [clean_answer(text, settings.get("until", [])) for text in texts]

    def _render(self, request: Instance) -> tuple[str, list[Image.Image]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(f"task {task}, document {doc_id}: LLaVA takes text and images, found video or audio")
        prompt = self.processor.apply_chat_template(messages.to_hf_messages(), tokenize=False, add_generation_prompt=True)
        if prompt.count(self.processor.image_token) != len(images):
            raise ValueError(f"task {task}, document {doc_id}: the prompt has another number of image tokens than images")
        return prompt, images

    def _generation_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) != 1:
            raise ValueError(f"lift_llava decodes greedily; the task asks for {settings}")
        return {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "num_beams": 1,
            "max_new_tokens": settings.get("max_new_tokens", 1024),
            "eos_token_id": end_tokens(self.model, self.processor.tokenizer) or None,
            "pad_token_id": self.processor.tokenizer.pad_token_id,
        }
