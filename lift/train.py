"""`lift pretrain`: image-caption pairs in, a run folder with an exported encoder out; LIFT and the CLIP baseline alike.

Both objectives see the same images in the same order with the same crops. Started again after a kill, a run goes on from
its newest checkpoint and ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from lift.common.errors import UserError
from lift.common.files import atomic_folder, sha256_text, write_json
from lift.common.ledger import DropLedger
from lift.data import Batch, TextSide, make_loader
from lift.embed import embed_shards, is_store_of
from lift.export import export_encoder
from lift.images import normalise
from lift.loss import contrastive_loss, cosine_loss
from lift.model import MAX_LOG_SCALE, ClipModel, LiftModel, build_clip, build_lift, parameter_groups
from lift.order import batch_positions
from lift.run_folder import (
    TEXT_ENCODER,
    TOKENIZER,
    Metrics,
    checkpoints,
    finished,
    load_checkpoint,
    open_run,
    save_checkpoint,
)
from lift.settings import PretrainSettings
from lift.sources import Sample, Shard, read_sources
from lift.store import EmbeddingStore
from lift.text_side import FixedTextSide, TrainedTextSide, clip_tokenizer
from lift.transforms import fitted_transform


@dataclass
class Setup:
    """What one objective needs besides the common loop."""

    model: LiftModel | ClipModel
    text_side: TextSide


def pretrain(settings: PretrainSettings) -> None:
    """Trains to the end and exports the encoder to OUT/encoder; a finished run is left as it is."""
    accelerator = Accelerator(mixed_precision="bf16" if settings.precision == "bf16" else "no")
    if settings.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {settings.batch_size}: not a multiple of the {accelerator.num_processes} processes.")
    ledger = DropLedger()
    shards = read_sources(settings.data, ledger)
    samples = [sample for shard in shards for sample in shard.samples]
    if accelerator.is_main_process:
        open_run(settings, samples)
    accelerator.wait_for_everyone()
    if (done := finished(settings.out)) is not None:
        accelerator.print(f"{settings.out}: finished at step {done['steps']}, reused")
        return
    total = len(samples) + len(ledger)
    setup = _set_up(settings, accelerator, shards, samples, ledger)
    ledger.check(total, settings.max_drop_fraction, settings.out / "dropped.jsonl")
    steps = math.ceil(settings.epochs * len(samples) / settings.batch_size)
    seconds = _Loop(settings, accelerator, setup, samples, ledger, total, steps).run()
    ledger.check(total, settings.max_drop_fraction, settings.out / "dropped.jsonl")
    if accelerator.is_main_process:
        export_encoder(settings.out, settings.out / "encoder")
        summary = {"steps": steps, "samples": len(samples), "dropped": ledger.counts(), "seconds": round(seconds, 1)}
        write_json(settings.out / "finished.json", summary)
        print(f"{settings.out / 'encoder'}: encoder of {settings.objective}, {steps} steps; {ledger.summary(total)}")


def _set_up(
    settings: PretrainSettings, accelerator: Accelerator, shards: list[Shard], samples: list[Sample], ledger: DropLedger
) -> Setup:
    """Model and text side; the run folder keeps the tokenizer of the one or the description of the other."""
    if settings.objective == "clip":
        saved = settings.out / TOKENIZER
        if accelerator.is_main_process and not saved.is_dir():
            tokenizer = clip_tokenizer(settings.clip_text, [c for s in samples for c in s.captions.values()])
            with atomic_folder(saved) as folder:
                tokenizer.save_pretrained(folder)
        accelerator.wait_for_everyone()
        tokenizer = AutoTokenizer.from_pretrained(saved)
        return Setup(build_clip(settings, tokenizer), TrainedTextSide(tokenizer, settings.clip_text.context_length))
    assert settings.embeddings is not None
    if accelerator.num_processes == 1:
        embed_shards(shards, settings.text_encoder, settings.embeddings, ledger, settings.max_drop_fraction)
    elif not is_store_of(settings.embeddings, shards, settings.text_encoder):
        raise UserError(f"{settings.embeddings}: no finished embedding store. With several processes run lift embed first.")
    with accelerator.main_process_first():  # the others then find the fitted transform in the store
        store = EmbeddingStore(settings.embeddings)
        transform = fitted_transform(store, settings.text_transform, settings.seed)
    if accelerator.is_main_process:
        write_json(settings.out / TEXT_ENCODER, store.manifest["encoder"])
    model = build_lift(settings, transform)
    if settings.objective == "cosine":
        model.log_scale.requires_grad_(False)
    return Setup(model, FixedTextSide(store, shards, ledger))


def learning_rate_at(step: int, steps: int, settings: PretrainSettings) -> float:
    """Linear warm-up from lr/warmup, then cosine to zero (official recipe). `step` counts from 0."""
    warmup = min(settings.warmup_steps, max(1, steps // 10))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class _Loop:
    """The optimisation loop: from the newest checkpoint, or step 0, to `steps`."""

    def __init__(
        self,
        settings: PretrainSettings,
        accelerator: Accelerator,
        setup: Setup,
        samples: list[Sample],
        ledger: DropLedger,
        total: int,
        steps: int,
    ) -> None:
        self.settings, self.accelerator, self.setup, self.samples = settings, accelerator, setup, samples
        self.ledger, self.total, self.steps = ledger, total, steps
        self.model = accelerator.prepare_model(setup.model)  # first: the optimizer's state follows its parameters' device
        self.optimizer = torch.optim.AdamW(
            parameter_groups(setup.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            eps=settings.epsilon,
        )
        saved = checkpoints(settings.out)
        self.first, self.seconds_before = load_checkpoint(saved[-1], setup.model, self.optimizer, ledger) if saved else (0, 0.0)
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent in the loop, in this session and those it continues."""
        return self.seconds_before + time.perf_counter() - self.started

    def run(self) -> float:
        """Returns the seconds that training took."""
        settings, accelerator = self.settings, self.accelerator
        loader = make_loader(
            self.samples,
            settings,
            self.setup.text_side,
            range(self.first, self.steps),
            accelerator.process_index,
            accelerator.num_processes,
        )
        main = accelerator.is_main_process
        metrics = Metrics(settings.out, self.first) if main else None
        bar = tqdm(total=self.steps, initial=self.first, desc=f"pretrain {settings.objective}", unit="step", disable=not main)
        window_start, window_steps, waited, ready = time.perf_counter(), 0, 0.0, time.perf_counter()
        for step, batch in enumerate(loader, start=self.first):
            waited += time.perf_counter() - ready
            row = self._step(step, batch)
            done, window_steps = step + 1, window_steps + 1
            if done % settings.log_every == 0 or done == self.steps:
                elapsed = time.perf_counter() - window_start
                row = {name: float(value) for name, value in row.items()}
                speed = window_steps * settings.batch_size / elapsed
                row |= {"samples_per_second": round(speed, 1), "data_wait_share": round(waited / elapsed, 4)}
                if metrics is not None:
                    metrics.log({"step": done, "keys": self._keys_hash(step), **row})
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                window_start, window_steps, waited = time.perf_counter(), 0, 0.0
                if not math.isfinite(row["loss"]):
                    raise UserError(f"loss is {row['loss']} at step {done}. Lower --learning_rate, or look at {settings.out}.")
            if done % settings.checkpoint_every == 0 or done == self.steps:
                self._checkpoint(done)
            bar.update()
            ready = time.perf_counter()
        bar.close()
        if metrics is not None:
            metrics.close()
        return self.seconds

    def _step(self, step: int, batch: Batch) -> dict[str, Tensor | float]:
        for key, cause, detail in batch.faults:
            self.ledger.drop(key, cause, detail)
        if batch.faults:  # a folder that vanishes should not cost the time to the next checkpoint
            self.ledger.check(self.total, self.settings.max_drop_fraction, self.settings.out / "dropped.jsonl")
        device = self.accelerator.device
        rate = learning_rate_at(step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pixels_B3HW = normalise(batch.pixels_B3HW.to(device, non_blocking=True))
        text = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.text.items()}
        valid_B = batch.valid_B.to(device)
        with self.accelerator.autocast():
            image_BD, text_BD, log_scale = self.model(pixels_B3HW, text)
        if self.settings.objective == "cosine":
            loss = cosine_loss(image_BD, text_BD, valid_B)
        else:
            loss = contrastive_loss(image_BD, text_BD, log_scale, valid_B)
        self.accelerator.backward(loss)
        limit = self.settings.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.setup.model.log_scale.clamp_(0, MAX_LOG_SCALE)
        mean_loss = self.accelerator.reduce(loss.detach(), reduction="mean")
        return {"loss": mean_loss, "learning_rate": rate, "gradient_norm": norm, "logit_scale": log_scale.detach().exp()}

    def _keys_hash(self, step: int) -> str:
        """Hash of the keys of the global batch: two runs that show the same hashes saw the same images in the same order."""
        places = batch_positions(self.settings.seed, step, self.settings.batch_size, len(self.samples))
        return sha256_text("\n".join(self.samples[index].key for _, index in places))[:16]

    def _checkpoint(self, step: int) -> None:
        """Gathers the ledgers, fails the run when too much was dropped, and saves from the main process."""
        for key, cause, detail in gather_object(self.ledger.rows()):
            self.ledger.drop(key, cause, detail)
        if self.accelerator.is_main_process:
            self.ledger.check(self.total, self.settings.max_drop_fraction, self.settings.out / "dropped.jsonl")
            save_checkpoint(self.settings.out, step, self.seconds, self.setup.model, self.optimizer, self.ledger)
        self.accelerator.wait_for_everyone()
