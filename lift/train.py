"""`lift pretrain`: image-caption pairs in, a run folder with an exported encoder out; LIFT and the CLIP baseline alike.

Both objectives see the same images in the same order with the same crops. Started again after a kill, a run goes on from
its newest checkpoint and ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from lift.common.errors import Preempted, UserError
from lift.common.files import atomic_folder, sha256_text, write_json
from lift.common.ledger import DropLedger
from lift.common.preemption import Votes
from lift.data import Batch, Pairs, TextSide, make_loader
from lift.embed import embed_shards, is_store_of
from lift.export import export_encoder
from lift.flops import matrix_peak, training_flops
from lift.model import ClipModel, LiftModel, build_clip, build_lift, parameter_groups
from lift.order import batch_positions
from lift.run_folder import (
    TEXT_ENCODER,
    TOKENIZER,
    Metrics,
    checkpoints,
    finished,
    load_checkpoint,
    open_run,
    save_best,
    save_checkpoint,
)
from lift.settings import PretrainSettings
from lift.sources import Samples, Shard, content_hash, read_sources
from lift.step import TrainingStep
from lift.store import EmbeddingStore
from lift.text_side import ExtraNegatives, FixedTextSide, TrainedTextSide, clip_tokenizer
from lift.transforms import fitted_transform
from lift.validation import Validation

PATIENCE = timedelta(hours=2)
"""How long processes wait for one that indexes the data or trains a tokenizer, where PyTorch gives up after ten minutes."""


@dataclass
class Setup:
    """What one objective needs besides the common loop."""

    model: LiftModel | ClipModel
    text_side: TextSide
    validation: Validation | None
    flops: float
    """Of one sample, forward and backward."""


def pretrain(settings: PretrainSettings) -> None:
    """Trains to the end and exports the encoder to OUT/encoder; a finished run is left as it is."""
    accelerator = open_accelerator(settings)
    if settings.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {settings.batch_size}: not a multiple of the {accelerator.num_processes} processes.")
    ledger = DropLedger()
    with accelerator.main_process_first():  # which builds the indexes that the others then find
        shards = read_sources(settings.data, ledger, accelerator.is_main_process)
    samples = Samples(shards)
    if accelerator.is_main_process:
        open_run(settings, content_hash(shards), len(samples))
    accelerator.wait_for_everyone()
    if (done := finished(settings.out)) is not None:
        accelerator.print(f"{settings.out}: finished at step {done['steps']}, reused")
        return
    total = len(samples) + len(ledger)
    setup = _set_up(settings, accelerator, samples, ledger)
    _check_ledger(ledger, total, settings, accelerator.is_main_process)
    pairs = Pairs(samples, settings)
    loop = _Loop(settings, accelerator, setup, pairs, ledger, total)
    seconds = loop.run()
    if accelerator.is_main_process:
        export_encoder(settings.out, settings.out / "encoder")
        summary = {"steps": loop.steps, "samples": len(samples), "dropped": ledger.counts(), "seconds": round(seconds, 1)}
        write_json(settings.out / "finished.json", summary)
        print(f"{settings.out / 'encoder'}: encoder of {settings.objective}, {loop.steps} steps; {ledger.summary(total)}")


def open_accelerator(settings: PretrainSettings) -> Accelerator:
    """Raises UserError when the launcher's processes do not find each other, and each would train alone."""
    # without being told, accelerate takes the processes of a launcher on CPUs for strangers
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        # the text transform, a buffer of 67 MB at 4096 dimensions, is the same everywhere and stays so
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if settings.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # of the loss, which autocast leaves alone
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but they work as {accelerator.num_processes}. Check LAUNCH."
        )
    return accelerator


def _set_up(settings: PretrainSettings, accelerator: Accelerator, samples: Samples, ledger: DropLedger) -> Setup:
    """Model and text side; the run folder keeps the tokenizer of the one or the description of the other."""
    held_out = None
    if settings.validation.data:
        held_out_ledger = DropLedger()
        with accelerator.main_process_first():
            held_out = Samples(read_sources(settings.validation.data, held_out_ledger, accelerator.is_main_process))
    if settings.objective == "clip":
        saved = settings.out / TOKENIZER
        if accelerator.is_main_process and not saved.is_dir():
            tokenizer = clip_tokenizer(settings.clip_text, samples.captions())
            with atomic_folder(saved) as folder:
                tokenizer.save_pretrained(folder)
        accelerator.wait_for_everyone()
        tokenizer = AutoTokenizer.from_pretrained(saved)
        length = settings.clip_text.context_length
        flops = training_flops(settings.vision, settings.clip_text.embedding_dim, settings.clip_text, length)
        validation = Validation(settings, held_out, tokenizer) if held_out is not None else None
        return Setup(build_clip(settings, tokenizer), TrainedTextSide(tokenizer, length), validation, flops)
    assert settings.embeddings is not None
    store = _store(settings, accelerator, samples.shards, settings.embeddings, ledger)
    if accelerator.is_main_process:
        write_json(settings.out / TEXT_ENCODER, store.manifest["encoder"])
    with accelerator.main_process_first():  # which fits it, when it is not in the store
        transform = fitted_transform(EmbeddingStore(settings.embeddings), settings.text_transform, settings.seed)
    model = build_lift(settings, transform)
    validation = None
    if held_out is not None:
        held_out_store = _store(settings, accelerator, held_out.shards, settings.validation_embeddings, held_out_ledger)
        validation = Validation(settings, held_out, held_out_store)
    negatives = None
    if settings.negatives.bank or settings.negatives.hard:
        negatives = ExtraNegatives(settings.negatives, store.manifest["encoder"], samples, settings.seed)
    text_side = FixedTextSide(store, samples, ledger, negatives)
    return Setup(model, text_side, validation, training_flops(settings.vision, store.dimension, None))


def _store(
    settings: PretrainSettings, accelerator: Accelerator, shards: list[Shard], folder: Path, ledger: DropLedger
) -> EmbeddingStore:
    """The store of these shards in `folder`, made here when it is not there."""
    if accelerator.num_processes == 1:
        embed_shards(shards, settings.text_encoder, folder, ledger, settings.max_drop_fraction)
    elif not is_store_of(folder, shards, settings.text_encoder):
        raise UserError(f"{folder}: no finished embedding store. With several processes run lift embed first.")
    return EmbeddingStore(folder)


def _check_ledger(ledger: DropLedger, total: int, settings: PretrainSettings, main: bool) -> None:
    """Raises UserError on every process alike when too much was dropped; the main one writes the ledger."""
    check = ledger.check if main else ledger.require
    check(total, settings.max_drop_fraction, settings.out / "dropped.jsonl")


def learning_rate_at(step: int, steps: int, settings: PretrainSettings) -> float:
    """Linear warm-up from lr/warmup, then cosine to zero (official recipe). `step` counts from 0."""
    warmup = min(settings.warmup_steps, max(1, steps // 10))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class _Loop:
    """The optimisation loop: from the newest checkpoint, or step 0, to `steps`."""

    def __init__(
        self, settings: PretrainSettings, accelerator: Accelerator, setup: Setup, pairs: Pairs, ledger: DropLedger, total: int
    ) -> None:
        self.settings, self.accelerator, self.setup, self.pairs = settings, accelerator, setup, pairs
        self.ledger, self.total = ledger, total
        self.steps = math.ceil(settings.epochs * len(pairs) / settings.batch_size)
        self.main = accelerator.is_main_process
        self.content = content_hash(pairs.samples.shards)
        wrapped = accelerator.prepare_model(setup.model)  # first: the optimizer's state follows its parameters' device
        self.gradients = TrainingStep(settings, accelerator, setup.model, wrapped)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(setup.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )
        saved = checkpoints(settings.out)
        self.first, self.seconds_before = load_checkpoint(saved[-1], setup.model, self.optimizer, ledger) if saved else (0, 0.0)
        self.new_drops: list[tuple[str, str, str]] = []
        """Of this process, since the ledger was shared."""
        self.dropped_before = len(ledger)
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent in the loop, in this session and those it continues."""
        return self.seconds_before + time.perf_counter() - self.started

    def run(self) -> float:
        """Returns the seconds that training took.

        Raises:
            UserError: the loss or the gradient norm is not finite, or too many samples were dropped.
            Preempted: SIGTERM came; a checkpoint of the last step is there.
        """
        settings, accelerator = self.settings, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        loader = make_loader(self.pairs, settings, self.setup.text_side, range(self.first, self.steps), rank, world)
        speed = _Speed(settings, accelerator, self.setup.flops)
        label = f"pretrain {settings.objective}"
        bar = tqdm(total=self.steps, initial=self.first, desc=label, unit="step", disable=not self.main)
        with Metrics(settings.out, self.first, self.main) as metrics, Votes() as votes, bar:
            for step, batch in enumerate(loader, start=self.first):
                speed.data_arrived()
                row = self._step(step, batch)
                done = step + 1
                last = done == self.steps
                if done % settings.log_every == 0 or last:
                    numbers = {name: float(value) for name, value in row.items()}
                    metrics.log({"step": done, "keys": self._keys_hash(step), **numbers, **speed.since_last()})
                    bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
                    self._require_finite(row, done)
                if self.setup.validation and (done % settings.validation.every == 0 or last):
                    self._validate(self.setup.validation, done, metrics)
                stop, dropped = votes.count(len(self.new_drops))
                if dropped + self.dropped_before > settings.max_drop_fraction * self.total:
                    self._share_ledger()  # which tells how many they are when none is counted twice
                if done % settings.checkpoint_every == 0 or last or stop:
                    self._require_finite(row, done)
                    self._checkpoint(done)
                if stop and not last:
                    raise Preempted(f"asked to end; saved step {done} of {self.steps}. The same command goes on from there.")
                bar.update()
                speed.data_awaited()
        return self.seconds

    def _step(self, step: int, batch: Batch) -> dict[str, Tensor | float]:
        self.new_drops += [fault for fault in batch.faults if self.ledger.drop(*fault)]
        rate = learning_rate_at(step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.gradients(step, batch)
        limit = self.settings.gradient_clip
        model = self.setup.model
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.log_scale.clamp_(0, math.log(self.settings.max_logit_scale))
        mean_loss = self.accelerator.reduce(loss, reduction="mean")
        return {"loss": mean_loss, "learning_rate": rate, "gradient_norm": norm, "logit_scale": model.log_scale.detach().exp()}

    def _require_finite(self, row: dict[str, Tensor | float], done: int) -> None:
        """Raises UserError for a loss or gradient norm that is not finite: the step's weights are lost."""
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(value := float(row[name])):
                raise UserError(
                    f"step {done}: {name} is {value}, the training has diverged. Lower --learning_rate; {self.settings.out} "
                    "holds the checkpoints before it."
                )

    def _validate(self, validation: Validation, done: int, metrics: Metrics) -> None:
        row = validation(self.setup.model, self.accelerator.device)
        metrics.log({"step": done, **row})
        if self.main:
            score = -row["validation_loss"] if self.settings.validation.best == "loss" else row["validation_recall"]
            save_best(self.settings.out, done, score, self.setup.model, row)

    def _keys_hash(self, step: int) -> str:
        """Hash of the global batch: two runs that show the same hashes saw the same images in the same order."""
        places = batch_positions(self.settings.seed, step, self.settings.batch_size, len(self.pairs))
        return sha256_text(f"{self.content} {[self.pairs.sample_of(item) for _, item in places]}")[:16]

    def _checkpoint(self, step: int) -> None:
        """Shares the ledger and saves from the main process."""
        self._share_ledger()
        if self.main:
            save_checkpoint(self.settings.out, step, self.seconds, self.setup.model, self.optimizer, self.ledger)
        self.accelerator.wait_for_everyone()

    def _share_ledger(self) -> None:
        """Every process learns what the others dropped, and fails with them when it is too much."""
        for drop in gather_object(self.new_drops):
            self.ledger.drop(*drop)
        self.new_drops, self.dropped_before = [], len(self.ledger)
        _check_ledger(self.ledger, self.total, self.settings, self.main)


class _Speed:
    """Throughput since it was last asked: samples a second, the share of time spent waiting for data, and MFU."""

    def __init__(self, settings: PretrainSettings, accelerator: Accelerator, flops: float) -> None:
        self.batch_size = settings.batch_size
        peak = matrix_peak(accelerator.device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        self.samples_at_peak = accelerator.num_processes * peak / flops
        self.on_gpu = accelerator.device.type == "cuda"
        self.step_before: torch.cuda.Event | None = None
        self._restart()

    def data_arrived(self) -> None:
        self.waited += time.perf_counter() - self.waiting
        self.steps += 1

    def data_awaited(self) -> None:
        if self.on_gpu:  # which may be steps behind, and does not wait while it is
            step = torch.cuda.Event()
            step.record()
            if self.step_before is not None:
                self.step_before.synchronize()
            self.step_before = step
        self.waiting = time.perf_counter()

    def since_last(self) -> dict[str, float]:
        """`mfu`: model FLOPs over what the devices could have done in the time at their measured matrix-product peak."""
        elapsed = time.perf_counter() - self.window
        rate = self.batch_size * self.steps / elapsed
        share = self.waited / elapsed
        self._restart()
        return {
            "samples_per_second": round(rate, 1),
            "data_wait_share": round(share, 4),
            "mfu": round(rate / self.samples_at_peak, 4),
        }

    def _restart(self) -> None:
        self.window = self.waiting = time.perf_counter()
        self.waited, self.steps = 0.0, 0
