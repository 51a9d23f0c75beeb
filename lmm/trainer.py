"""transformers' Trainer with what LLaVA training adds: a learning rate of the projector's own, a vision tower that stays in
evaluation mode, a sample order that survives a kill, checkpoints that say when they are complete, and metrics as JSON lines.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lift.common.files import read_whole_rows, write_jsonl
from lmm.batches import EpochSampler, make_sampler
from lmm.checkpoints import mark_complete
from lmm.packing import attention_of, refuse_leaks
from lmm.settings import StageSettings

PROJECTOR = "multi_modal_projector."
METRICS = "metrics.jsonl"


def training_arguments(settings: StageSettings, work: Path, deepspeed: dict[str, Any]) -> TrainingArguments:
    """Must be made after the process group, and before the model is loaded: ZeRO-3 partitions weights as they load.

    Raises:
        RuntimeError: accelerate and torch.distributed disagree about the number of processes.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        report_to=["tensorboard"],
        remove_unused_columns=False,
        log_level="error",
        disable_tqdm=False,
    )
    if arguments.world_size != torch.distributed.get_world_size():
        raise RuntimeError(f"accelerate sees {arguments.world_size} processes, torch {torch.distributed.get_world_size()}")
    return arguments


def freeze(model: nn.Module, trainable: str) -> None:
    """Leaves gradients on the projector, and on the language model if `trainable` says so."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = PROJECTOR in name or (trainable == "projector_and_llm" and "vision_tower." not in name)


class StageTrainer(Trainer):
    """Trainer of one stage.

    Args:
        settings: the stage; `arguments` must come from `training_arguments(settings, ...)`.
    """

    def __init__(self, settings: StageSettings, *, args: TrainingArguments, **keywords: Any) -> None:
        self.settings = settings
        batches_per_step = args.world_size * settings.gradient_accumulation
        self.sampler = make_sampler(settings, keywords["train_dataset"].rows, batches_per_step)
        self.packing_to_check = settings.packing
        super().__init__(args=args, **keywords)
        self.add_callback(_EachEpochAndLastStep(self.sampler))
        if args.process_index == 0:
            self.add_callback(_MetricsFile(Path(str(args.output_dir)) / METRICS))

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def compute_loss(self, model: nn.Module, *args: Any, **keywords: Any) -> Any:
        # Trainer puts the whole model in training mode at each step; a frozen tower must not drop out.
        llava: Any = self.model
        if self.packing_to_check:
            self.packing_to_check = False
            self._check_packing(model)
        llava.model.vision_tower.eval()
        return super().compute_loss(model, *args, **keywords)

    def _check_packing(self, model: nn.Module) -> None:
        llava: Any = self.model
        model.eval()
        vocabulary = llava.get_input_embeddings().num_embeddings
        refuse_leaks(lambda **inputs: model(**inputs).logits, vocabulary, self.args.device, attention_of(llava))
        model.train()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with up to four groups: projector or not, weight decay or not."""
        target: Any = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(target))
        projector_rate = self.settings.projector_learning_rate or self.settings.learning_rate
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in target.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((PROJECTOR in name, name in decayed), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": projector_rate if projector else self.settings.learning_rate,
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                }
                for (projector, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
            ],
            lr=self.settings.learning_rate,
        )
        return self.optimizer

    def _save_checkpoint(self, *args: Any, **keywords: Any) -> None:
        super()._save_checkpoint(*args, **keywords)
        torch.distributed.barrier()
        if self.args.should_save:
            mark_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}", self.args.world_size)


class _EachEpochAndLastStep(TrainerCallback):
    """Sets the sampler's epoch directly: on a resumed run with several processes accelerate's wrappers do not reach it.

    The last step is logged whatever logging_steps is, so that every run has a final loss.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        steps_per_epoch = max(1, math.ceil(len(keywords["train_dataloader"]) / args.gradient_accumulation_steps))
        self.sampler.set_epoch(state.global_step // steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class _MetricsFile(TrainerCallback):
    """Appends every log to a JSON-lines file; what lies beyond the step a run resumes from is written again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        kept = [row for row in read_whole_rows(self.path) if row["step"] <= state.global_step] if self.path.is_file() else []
        write_jsonl(self.path, kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **keywords: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
