"""transformers' Trainer with what LLaVA training adds: learning rates by part of the model, a frozen vision tower that stays in
evaluation mode, a sample order that survives a kill, checkpoints that say when they are complete and hold a loadable model, and
metrics as JSON lines with the number of supervised tokens of every step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lift.common.errors import UserError
from lift.common.files import read_whole_rows, write_jsonl
from lift.common.preemption import Votes, outlive_preemption
from lmm.batches import EpochSampler, make_sampler
from lmm.checkpoints import mark_complete
from lmm.packing import attention_of, refuse_leaks
from lmm.settings import StageSettings

PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower."
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
        max_grad_norm=settings.gradient_clip,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        torch_compile=settings.compile,
        use_liger_kernel=settings.use_liger_kernel,
        average_tokens_across_devices=True,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # which would show a mean of earlier losses instead
        report_to=["tensorboard"],
        remove_unused_columns=False,
        log_level="error",
        disable_tqdm=False,
    )
    if arguments.world_size != torch.distributed.get_world_size():
        raise RuntimeError(f"accelerate sees {arguments.world_size} processes, torch {torch.distributed.get_world_size()}")
    return arguments


def freeze(model: nn.Module, trainable: str) -> None:
    """Leaves gradients on the projector, on the language model and on the vision tower as `trainable` says."""
    learns = {"projector": True, "language_model": trainable != "projector", "vision_tower": trainable == "all"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = learns[part_of(name)] and parameter.is_floating_point()  # quantised weights are bytes


def freeze_unused(model: nn.Module, config: Any) -> None:
    """Freezes what lies behind the tower's feature layer: it gets no gradient, and DeepSpeed wants one for all that learns."""
    unused = _behind_the_features(config)
    for name, parameter in model.named_parameters():
        if TOWER in name and any(part in name for part in unused):
            parameter.requires_grad = False


def _behind_the_features(config: Any) -> list[str]:
    """Parts of parameter names; empty where several layers' features are used."""
    layers, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if not isinstance(layer, int):
        return ["post_layernorm."]
    first = layers + 1 + layer if layer < 0 else layer  # hidden state 0 is that of the embeddings
    return ["post_layernorm.", *(f"encoder.layers.{number}." for number in range(first, layers))]


def part_of(name: str) -> str:
    """`projector`, `vision_tower` or `language_model`, by a parameter's name in memory."""
    return "projector" if PROJECTOR in name else "vision_tower" if TOWER in name else "language_model"


def make_optimizer(groups: list[dict[str, Any]], settings: StageSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        quantised: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.learning_rate)
        return quantised
    # Under offloading the step runs on the CPU, where the plain loop over tensors is slow.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True if settings.offload else None)


class StageTrainer(Trainer):
    """Trainer of one stage.

    Args:
        settings: the stage; `arguments` must come from `training_arguments(settings, ...)`.
        write: writes the model with the given weights (keyed as in memory, gathered) into a folder.
    """

    def __init__(
        self,
        settings: StageSettings,
        write: Callable[[dict[str, torch.Tensor], Path], None],
        *,
        args: TrainingArguments,
        **keywords: Any,
    ) -> None:
        self.settings, self.write = settings, write
        self.supervised_tokens = 0
        self.loss_since_checkpoint = torch.zeros((), device=args.device)
        model = keywords["model"]
        llava = model.get_base_model() if settings.lora else model
        self.frozen_tower = None if settings.trainable == "all" else llava.model.vision_tower
        batches_per_step = args.world_size * settings.gradient_accumulation
        self.sampler = make_sampler(settings, keywords["train_dataset"].rows, batches_per_step)
        self.packing_to_check = settings.packing
        self.votes = Votes()
        self.preempted = False
        super().__init__(args=args, **keywords)
        self.add_callback(_EachEpochAndLastStep(self.sampler))
        self.add_callback(_AfterEachStep(self))
        if args.process_index == 0:
            self.add_callback(_MetricsFile(Path(str(args.output_dir)) / METRICS, self))

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        loader.base_dataloader.worker_init_fn = partial(_start_worker, loader.base_dataloader.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def compute_loss(self, model: nn.Module, *args: Any, **keywords: Any) -> Any:
        # Trainer puts the whole model in training mode at each step; a frozen tower must not drop out.
        if self.packing_to_check:
            self.packing_to_check = False
            self._check_packing(model)
        if self.frozen_tower is not None:
            self.frozen_tower.eval()
        return super().compute_loss(model, *args, **keywords)

    def _check_packing(self, model: nn.Module) -> None:
        llava: Any = self.model
        model.eval()
        for module in model.modules():
            # in evaluation mode a 4-bit layer on a CPU repacks its weights for good, and has no gradient from then on
            if type(module).__module__.startswith("bitsandbytes"):
                module.training = True
        vocabulary = llava.get_input_embeddings().num_embeddings
        refuse_leaks(lambda **inputs: model(**inputs).logits, vocabulary, self.args.device, attention_of(llava))
        model.train()

    def get_batch_samples(self, *args: Any, **keywords: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step and its number of supervised tokens, by which Trainer divides the loss.

        Raises:
            UserError: no token of the step is supervised on any process; the loss would be 0 and teach nothing.
        """
        batches: tuple[list[Any], Any] = super().get_batch_samples(*args, **keywords)
        if batches[0]:
            self.supervised_tokens = int(batches[1])
            if self.supervised_tokens == 0:
                raise UserError(
                    f"step {self.state.global_step + 1}: every label is masked, so that there is nothing to learn from. "
                    f"The template '{self.settings.template}' marks no token of these samples as an answer: "
                    "see what it marks with lmm inspect-mask."
                )
        return batches

    def training_step(self, *args: Any, **keywords: Any) -> torch.Tensor:
        loss = super().training_step(*args, **keywords)
        self.loss_since_checkpoint += loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        super().log({**logs, "supervised_tokens": self.supervised_tokens} if "loss" in logs else logs, *args, **keywords)
        self._require_finite(logs.get("loss", 0.0))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self.diverged(f"a loss of {loss}")

    def diverged(self, found: str) -> UserError:
        return UserError(
            f"step {self.state.global_step}: {found}; the training has diverged. Lower the learning rates or raise "
            f"warmup_ratio, and start over: {self.args.output_dir} holds the checkpoints before it and is to be removed."
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each of language model, projector and vision tower, with and without weight decay."""
        target: Any = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(target))
        rates = {"projector": self.settings.projector_learning_rate, "vision_tower": self.settings.tower_learning_rate}
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in target.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((part_of(name), name in decayed), []).append(parameter)
        self.optimizer = make_optimizer(
            [
                {
                    "params": parameters,
                    "lr": rates.get(part) or self.settings.learning_rate,
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                }
                for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
            ],
            self.settings,
        )
        return self.optimizer

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """The weights to be written, on the main process; every process must call this.

        With lora only those that learn, unless the tower does: PEFT saves it whole, with the layers that stay frozen.
        """
        engine: Any = self.deepspeed
        model: Any = self.model
        if not self.settings.lora or self.settings.trainable == "all":
            state: dict[str, torch.Tensor] = self.accelerator.get_state_dict(engine)
        elif engine.zero_optimization_partition_weights():
            state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        else:
            state = {name: value.detach().cpu() for name, value in model.named_parameters() if value.requires_grad}
        return state

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A folder that transformers loads (with lora: one that PEFT loads), also in the middle of the training."""
        state = self.gathered_state()
        if self.args.should_save:
            self.write(state, Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, *args: Any, **keywords: Any) -> None:
        torch.distributed.all_reduce(self.loss_since_checkpoint)
        self._require_finite(float(self.loss_since_checkpoint))
        self.loss_since_checkpoint.zero_()
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        # a resumed Trainer takes these from the checkpoint, but they are free to change
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        steps_per_epoch = max(1, math.ceil(len(keywords["train_dataloader"]) / args.gradient_accumulation_steps))
        self.sampler.set_epoch(state.global_step // steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def _start_worker(seed: Callable[[int], None], worker: int) -> None:
    seed(worker)
    outlive_preemption(worker)


class _AfterEachStep(TrainerCallback):
    """A step that DeepSpeed skipped ends the training; after a SIGTERM to any process it is saved, and `preempted` set."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        engine: Any = self.trainer.deepspeed
        if engine.skipped_steps:
            raise self.trainer.diverged("gradients that are not finite, and a step that DeepSpeed skipped")
        asked, _ = self.trainer.votes.count()
        if asked and state.global_step < state.max_steps:
            self.trainer.preempted = control.should_save = control.should_training_stop = True


class _MetricsFile(TrainerCallback):
    """Appends every log to a JSON-lines file, and for a step without one its number of supervised tokens.

    What lies beyond the step that a run resumes from is written again.
    """

    def __init__(self, path: Path, trainer: StageTrainer) -> None:
        self.path, self.trainer = path, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        kept = [row for row in read_whole_rows(self.path) if row["step"] <= state.global_step] if self.path.is_file() else []
        write_jsonl(self.path, kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if not control.should_log:
            self._append({"step": state.global_step, "supervised_tokens": self.trainer.supervised_tokens})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **keywords: Any) -> None:
        self._append({"step": state.global_step, **(logs or {})})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
