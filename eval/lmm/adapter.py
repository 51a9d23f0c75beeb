"""A LLaVA folder as an lmms-eval model: chat requests come in, answers go out, in batches, and onto disk as they come.

The stock `llava_hf` answers one request at a time and turns an error into an empty answer; this adapter batches by length with
left padding, gives the same answers (in float32), takes text-only rows, honours `until` and lets every error through.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, GenerationConfig

from eval.lmm.answers import ROWS_FILE, Answer, AnswerFile, open_answers, read_answers, without_images, write_thumbnail
from eval.lmm.image_features import ImageFeatures
from eval.lmm.likelihood import FirstStep, letter_tokens, log_probabilities
from eval.lmm.plugin import PROGRESS, clean_answer
from eval.lmm.shared_prompts import Prompt, generate
from eval.lmm.tasks import LMM_TASKS, LmmTask, image_hash
from lift.common.errors import UserError
from lift.common.files import read_json, write_json
from lmm.folders import context_length
from lmm.inference import check_is_llava, end_tokens, load_whole

_LENGTH_STEP = 32
"""Characters. Groups are batched by their longest row in steps of this."""


@dataclass(frozen=True)
class TaskJob:
    """What `lift-eval lmm` wants of one task."""

    task: LmmTask
    folder: Path
    """Where the answers go, and where those of an interrupted run are."""
    max_new_tokens: int
    likelihood: bool


class Row(NamedTuple):
    """A request, rendered."""

    name: str
    """For messages."""
    prompt: str
    images: list[tuple[str, Image.Image]]
    """Content hash and image."""
    letters: dict[str, list[int]]
    """Option letter -> token ids; empty where no likelihood is wanted."""


class Said(NamedTuple):
    response: str
    log_probabilities: dict[str, float] | None


class LiftLlava(lmms):
    """`--model lift_llava --model_args pretrained=FOLDER[,dtype=float32|bfloat16|auto] --batch_size N --device cpu|cuda`.

    `job` in the model_args is the JSON file by which `lift-eval lmm` says, for each of lmms-eval's tasks, what is wanted
    (`name`, `folder`, `max_new_tokens`, `likelihood`); without it, answers go to lmms-eval only.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        job: str | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = int(batch_size)
        self.folder, self.dtype = Path(pretrained), dtype
        check_is_llava(self.folder)
        self.jobs: dict[str, TaskJob] = {}
        for lmms_task, wanted in read_json(Path(job), "a job of lift-eval lmm").items() if job else ():
            task = LMM_TASKS[wanted["name"]]
            self.jobs[lmms_task] = TaskJob(task, Path(wanted["folder"]), wanted["max_new_tokens"], wanted["likelihood"])

    @cached_property
    def processor(self) -> Any:
        processor = AutoProcessor.from_pretrained(self.folder, backend="pil", local_files_only=True, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    @cached_property
    def model(self) -> Any:
        """Loaded by the first row to answer: a run of which only the scoring is left need not wait for it."""
        model = load_whole(self.folder, self.dtype).to(self.device)
        # Every choice is ours: penalties that a model's own configuration asks for would also count the padding of a batch.
        model.generation_config = GenerationConfig(
            eos_token_id=end_tokens(model, self.processor.tokenizer) or None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        return model

    @cached_property
    def image_features(self) -> ImageFeatures:
        return ImageFeatures(self.model, self.processor.image_processor)

    def clean(self) -> None:
        """The base class deletes the model's modules after a run; this object may be used again."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lift_llava takes tasks that generate; option letters are scored by lift-eval lmm")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("lift_llava takes tasks of one round")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers in the order of `requests`, one task after the other. Batches share their settings."""
        positions_by_task: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            positions_by_task[request.args[4]].append(position)
        responses: dict[int, str] = {}
        with tqdm(total=len(requests), desc=PROGRESS) as progress:
            for task, positions in positions_by_task.items():
                its_requests = [requests[position] for position in positions]
                answered = self._answer_task(its_requests, self.jobs.get(task), progress)
                responses.update(zip(positions, answered, strict=True))
        return [responses[position] for position in range(len(requests))]

    def _answer_task(self, requests: list[Instance], job: TaskJob | None, progress: Any) -> list[str]:
        docs = _docs_without_images(self.task_dict[requests[0].args[4]][requests[0].args[5]])
        its_docs = [without_images(docs[request.args[3]]) for request in requests]
        with ExitStack() as stack:
            file, earlier = None, {}
            if job is not None:
                file, earlier = stack.enter_context(open_answers(job.folder)), read_answers(job.folder)
                write_json(job.folder / ROWS_FILE, len(docs))
            responses: dict[int, str] = {}
            for place, request in enumerate(requests):
                before = earlier.get(request.args[3])
                if before is not None and before.doc == its_docs[place]:
                    responses[place] = before.response
            progress.update(len(responses))
            to_answer = [place for place in range(len(requests)) if place not in responses]
            for batch in self._batches(requests, its_docs, to_answer, job):
                answers = self._answer([requests[place] for place in batch], [its_docs[place] for place in batch], job, file)
                responses.update(zip(batch, answers, strict=True))
                progress.update(len(batch))
        return [responses[place] for place in range(len(requests))]

    def _batches(
        self, requests: list[Instance], docs: list[dict[str, Any]], places: list[int], job: TaskJob | None
    ) -> list[list[int]]:
        """Places in batches of the same settings and like length, longest first; rows of a group, or image, stand together."""
        by_settings: dict[str, list[int]] = defaultdict(list)
        for place in places:
            by_settings[repr(sorted(requests[place].args[2].items()))].append(place)

        length_of = {place: len(requests[place].args[0]) for place in places}
        group_of = {place: job.task.record(docs[place], "", ()).group if job is not None else "" for place in places}
        longest: dict[str, int] = defaultdict(int)
        for place, group in group_of.items():
            longest[group] = max(longest[group], length_of[place])

        def order(place: int) -> tuple[int, str, int, int]:
            group = group_of[place]
            return -(longest[group] // _LENGTH_STEP), group, -length_of[place], place

        batches = []
        for its_places in by_settings.values():
            ordered = sorted(its_places, key=order)
            batches += [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        return batches

    def _answer(
        self, batch: list[Instance], docs: list[dict[str, Any]], job: TaskJob | None, file: AnswerFile | None
    ) -> list[str]:
        start = time.monotonic()
        rows = [self._render(request, doc, job) for request, doc in zip(batch, docs, strict=True)]
        settings = batch[0].args[2] | ({"max_new_tokens": job.max_new_tokens} if job is not None else {})
        said = self._generate(rows, settings)
        if job is not None and file is not None:
            for sha256, image in (image for row in rows for image in row.images):
                write_thumbnail(image, sha256, job.folder)
            seconds = (time.monotonic() - start) / len(batch)
            file.add(
                Answer(
                    doc_id=request.args[3],
                    doc=doc,
                    images=[sha256 for sha256, _ in row.images],
                    prompt_sha256=hashlib.sha256(row.prompt.encode()).hexdigest(),
                    response=each.response,
                    log_probabilities=each.log_probabilities,
                    seconds=seconds,
                )
                for request, doc, row, each in zip(batch, docs, rows, said, strict=True)
            )
        return [each.response for each in said]

    def _generate(self, rows: Sequence[Row], settings: dict[str, Any]) -> list[Said]:
        tokenizer, image_token = self.processor.tokenizer, self.processor.image_token
        first_step = FirstStep()
        with torch.inference_mode():
            features = iter(self.image_features.of([image for row in rows for image in row.images]))
            its_features = [[next(features) for _ in row.images] for row in rows]
            texts = []
            for row, its in zip(rows, its_features, strict=True):
                # every image token becomes as many as its image has features
                first, *following = row.prompt.split(image_token)
                texts.append(first + "".join(image_token * len(each) + text for each, text in zip(its, following, strict=True)))
            prompts = [
                Prompt(ids, tuple(sha256 for sha256, _ in row.images), its)
                for ids, row, its in zip(tokenizer(texts)["input_ids"], rows, its_features, strict=True)
            ]
            self._require_positions(rows, [len(prompt.ids) for prompt in prompts])
            tokens_BT = generate(self.model, tokenizer, prompts, logits_processor=[first_step], **_greedy(settings))
        responses = tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
        assert first_step.logits is not None
        return [
            Said(
                clean_answer(text, settings.get("until", [])),
                log_probabilities(logits, row.letters) if row.letters else None,
            )
            for text, row, logits in zip(responses, rows, first_step.logits, strict=True)
        ]

    def _require_positions(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        positions = context_length(self.model.config.text_config)
        for row, length in zip(rows, lengths, strict=True):
            if length >= positions:
                raise UserError(
                    f"{row.name}: the prompt has {length} tokens, but the language model has {positions} positions, and the "
                    "answer needs some of them. Take the row out of the data, or a language model of longer context."
                )

    def _render(self, request: Instance, doc: dict[str, Any], job: TaskJob | None) -> Row:
        _, doc_to_messages, _, doc_id, task, split = request.args
        name = f"task {task}, document {doc_id}"
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(f"{name}: LLaVA takes text and images, found video or audio")
        hf_messages = messages.to_hf_messages()
        prompt = self.processor.apply_chat_template(hf_messages, tokenize=False, add_generation_prompt=True)
        if prompt.count(self.processor.image_token) != len(images):
            raise ValueError(f"{name}: the prompt has another number of image tokens than images")
        letters: dict[str, list[int]] = {}
        if job is not None and job.likelihood and (wanted := job.task.letters(doc)):
            answer = {"role": "assistant", "content": [{"type": "text", "text": wanted[0]}]}
            answered = self.processor.apply_chat_template([*hf_messages, answer], tokenize=False)
            letters = letter_tokens(self.processor.tokenizer, prompt, answered, wanted)
        return Row(name, prompt, [(image_hash(image), image) for image in images], letters)


def _docs_without_images(docs: Any) -> Any:
    """The same rows without the columns whose images would have to be decoded to be left out."""
    from datasets import Dataset, Image

    if not isinstance(docs, Dataset):
        return docs
    columns = [name for name, feature in docs.features.items() if isinstance(getattr(feature, "feature", feature), Image)]
    return docs.remove_columns(columns)


def _greedy(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) != 1:
        raise ValueError(f"lift_llava decodes greedily; the task asks for {settings}")
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": settings.get("max_new_tokens", 1024)}
