"""`lmm train`: one stage of LLaVA training under DeepSpeed, from model folder to model folder.

In: a LLaVA folder and conversation files. Out: a folder that plain transformers loads (with lora: an adapter folder for
`lmm merge`), with `train.json`, `metrics.jsonl`, TensorBoard events, `dropped.jsonl` and `config.yaml`; it appears only when
complete. Until then the work lies in `OUT.training`, and the same command goes on from its newest complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lift.common.environment import describe_environment
from lift.common.errors import Preempted, UserError, first_line
from lift.common.files import atomic_folder, read_json, read_jsonl, require_file, require_folder, sha256_text, write_json
from lift.common.ledger import DropLedger
from lift.common.settings import save_settings, to_plain
from lmm.adapters import BASE, add_adapters, quantisation, write_adapters
from lmm.build import DTYPES
from lmm.checkpoints import newest_complete, remove_incomplete
from lmm.combinations import check_combinations
from lmm.conversation import ConversationEncoder, load_template
from lmm.data import ConversationDataset, Rows, check_samples, describe_sources, read_sources, require_positions
from lmm.distributed import deepspeed_config, release, start_process_group
from lmm.feature_cache import cached_dataset, take_features
from lmm.folders import check_fits, check_loads, content_hash, context_length, load_weights, tower_hash
from lmm.packing import make_collator
from lmm.processor import set_aspect_ratio
from lmm.settings import StageSettings, TrainSettings
from lmm.trainer import METRICS, StageTrainer, freeze, freeze_unused, training_arguments

FREE_TO_CHANGE = frozenset({"workers", "save_steps", "logging_steps", "max_drop_fraction"})
"""Settings that do not change the weights; a run may go on with others."""


def train(settings: TrainSettings) -> Path:
    return train_stage(settings.model, settings.out, settings)


def train_stage(model: Path, out: Path, settings: StageSettings, replace: bool = False) -> Path:
    """Trains one stage, or returns at once when `out` already holds its result.

    Args:
        replace: a finished `out` of other settings or inputs is trained anew and replaced, instead of being an error.
    Raises:
        UserError: unusable model, data or DeepSpeed file, too many dropped samples, or `out` holds something else.
        Preempted: SIGTERM came; a checkpoint of the last step is there, or `out` where the training was at its end.
    """
    require_folder(model, "a LLaVA model's folder")
    config = deepspeed_config(settings)
    check_combinations(settings, config)
    identity = stage_identity(model, settings, config)
    if out.exists():
        found = read_json(out / "train.json").get("fingerprint") if (out / "train.json").is_file() else None
        if found == identity["fingerprint"]:
            print(f"{out}: finished already, reused")
            return out
        if found is None or not replace:
            raise UserError(f"{out}: is there, but not from these settings and inputs. Remove it or choose another --out.")
    rank, world_size = start_process_group()
    work = out.with_name(out.name + ".training")
    resume_from = _open_work(work, identity, rank, world_size)
    stage = _Stage(model, identity["model_hash"], settings, work, config, rank, world_size)
    started = time.monotonic()
    try:
        with stage.trainer.votes:
            result = stage.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            asked_to_end, _ = stage.trainer.votes.count()  # also since the last step
        if stage.trainer.preempted:
            raise Preempted(f"asked to end; saved step {result.global_step}. The same command goes on from there.")
    except (UserError, Preempted):
        release(stage.trainer)
        raise
    seconds = time.monotonic() - started
    steps_here = result.global_step - (int(resume_from.name.rpartition("-")[2]) if resume_from else 0)
    samples_here = steps_here * settings.batch_size * settings.gradient_accumulation * world_size
    record = {
        **identity,
        "model": str(model),
        "settings": stage_settings(settings),
        "seconds": round(seconds, 2),
        "resumed_from": resume_from.name if resume_from else None,
        "steps": result.global_step,
        "samples_per_second": round(samples_here / seconds, 2),
        "samples": len(stage.rows),
        "supervised_tokens": stage.supervised_tokens,
        "dropped": stage.ledger.counts(),
        "cut": stage.rows.cut_samples,
        "processes": world_size,
        "environment": describe_environment(),
    }
    _finish(stage, out, record)
    if asked_to_end:
        raise Preempted(f"asked to end; {out} is finished. The same command goes on from there.")
    return out


class _Stage:
    """Data, model and trainer of one stage, made in the order that DeepSpeed needs."""

    def __init__(
        self,
        model: Path,
        model_hash: str,
        settings: StageSettings,
        work: Path,
        config: dict[str, Any],
        rank: int,
        world_size: int,
    ) -> None:
        self.rank, self.work, self.settings = rank, work, settings
        self.base, self.base_hash = model, model_hash
        self.processor, llava = load_processor(model)
        check_fits(model, llava)
        set_aspect_ratio(self.processor, settings.image_aspect_ratio)
        self.encoder = make_encoder(self.processor, llava, settings, model)
        self.ledger = DropLedger()
        rows = read_sources(settings.data)
        self.rows, self.supervised_tokens = check_samples(
            rows, self.encoder, self.ledger, settings.workers, rank, world_size, settings.unsupervised == "drop"
        )
        self._report(rows)
        require_positions(self.rows, context_length(llava.text_config), "max_length")
        dataset = ConversationDataset(self.rows, self.encoder, self.processor.image_processor)
        # Made now, because under ZeRO-3 a model that is made later has its weights partitioned.
        if settings.cache_features:
            dataset = cached_dataset(dataset, settings, model, llava, rank, world_size)
        self.shell = None if settings.lora else make_shell(llava)
        arguments = training_arguments(settings, work, config)
        loaded = load_llava(model, settings.precision, settings.quantise)
        freeze(loaded, settings.trainable)
        self.model: Any = loaded
        if settings.lora:
            self.model = add_adapters(loaded, model, settings.lora, settings.trainable == "all", settings.seed)
        freeze_unused(self.model, llava)
        if settings.cache_features:
            take_features(llava, loaded.model.vision_tower)
        self.trainer = StageTrainer(
            settings,
            self.write,
            args=arguments,
            model=self.model,
            train_dataset=dataset,
            data_collator=make_collator(settings, llava, self.model, self.processor.tokenizer.pad_token_id),
        )

    def write(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """The model with the weights `state` and its processor."""
        if self.shell is None:
            write_adapters(self.model, state, folder, self.base, self.base_hash)
        else:
            write_model(self.model, state, folder, self.shell)
        self.processor.save_pretrained(folder)

    def _report(self, rows: Rows) -> None:
        if self.rank == 0:
            cut = f"; {self.rows.cut_samples} cut at max_length" if self.settings.over_long == "cut" else ""
            print(f"{self.ledger.summary(len(rows))}; {self.supervised_tokens} supervised tokens{cut}")
            self.ledger.check(len(rows), self.settings.max_drop_fraction, self.work / "dropped.jsonl")
        elif len(self.ledger) > self.settings.max_drop_fraction * len(rows):
            raise UserError("too many samples dropped; the main process lists them")
        if not self.rows:
            raise UserError(f"no usable sample is left of {len(rows)}; {self.work / 'dropped.jsonl'} says why.")


def tokens_per_image(llava: LlavaConfig) -> int:
    vision: Any = llava.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def load_processor(model: Path) -> tuple[Any, LlavaConfig]:
    """Raises UserError when `model` is not a LLaVA folder with the class token dropped, as all of LLaVA-1.5's are."""
    if (model / BASE).is_file():
        raise UserError(f"{model}: holds adapters, not a whole model. Merge them first: lmm merge {model}")
    require_file(model / "config.json", "a LLaVA model's configuration")  # transformers would go on with its defaults
    try:
        processor = AutoProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
        llava = LlavaConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{model}: expected a LLaVA folder, as `lmm build` writes it: {first_line(error)}") from error
    if llava.model_type != "llava" or llava.vision_feature_select_strategy != "default":
        raise UserError(f"{model}: expected a LLaVA model with vision_feature_select_strategy 'default'.")
    if processor.tokenizer.pad_token_id is None:
        raise UserError(
            f"{model}: the tokenizer has no pad token, which batches of unequal samples need. "
            "Build the model anew with lmm build, which chooses one, or name one in tokenizer_config.json (pad_token)."
        )
    return processor, llava


def load_llava(model: Path, precision: str, quantise: str = "none") -> LlavaForConditionalGeneration:
    """The model with every weight from `model`; its language model held in few bits if `quantise` says so.

    Raises:
        UserError: as `load_weights`.
    """
    keywords: dict[str, Any] = {}
    if quantise != "none":
        keywords["quantization_config"] = quantisation(quantise, DTYPES[precision])
        if not is_deepspeed_zero3_enabled():  # which finds the place by itself
            keywords["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    return load_weights(model, use_safetensors=True, dtype=DTYPES[precision], **keywords)


def make_encoder(processor: Any, llava: LlavaConfig, settings: StageSettings, model: Path) -> ConversationEncoder:
    """The encoder of the stage's template. Training on vicuna_v1 makes it the model's chat template, so that inference fits."""
    if settings.template == "chat":
        template, name = processor.chat_template or processor.tokenizer.chat_template, f"{model}/chat_template.jinja"
        if not isinstance(template, str):
            raise UserError(f"{model}: expected a chat template, found none. Train with --template vicuna_v1.")
    else:
        template, name = load_template(settings.template), settings.template
    if settings.template == "vicuna_v1":
        processor.chat_template = processor.tokenizer.chat_template = template
    per_image, cuts = tokens_per_image(llava), settings.over_long == "cut"
    return ConversationEncoder(processor.tokenizer, template, name, processor.image_token, per_image, settings.max_length, cuts)


def stage_settings(settings: StageSettings) -> dict[str, Any]:
    """The fields of StageSettings alone, also of a subclass that adds paths."""
    plain = to_plain(settings)
    return {field.name: plain[field.name] for field in dataclasses.fields(StageSettings)}


def stage_identity(model: Path, settings: StageSettings, config: dict[str, Any]) -> dict[str, Any]:
    """What decides the result: model content, data content, settings. `fingerprint` is the hash of them all."""
    deciding = {
        key: value for key, value in stage_settings(settings).items() if key not in FREE_TO_CHANGE | {"data", "deepspeed"}
    }
    deciding["cache_features"] = settings.cache_features is not None  # where they lie does not matter, their rounding does
    records = [model / name for name in ("build.json", "train.json") if (model / name).is_file()]
    origin = read_json(records[0]) if records else {}
    data = describe_sources(settings.data)
    parts = {
        "model_hash": content_hash(model),
        "vision_tower_hash": origin.get("vision_tower_hash"),
        "vision_tower_weights_hash": tower_hash(model),
        "data": data,
        "deepspeed": config,
    }
    hashed = [{key: value for key, value in source.items() if key != "annotations"} for source in data]
    text = json.dumps([deciding, parts["model_hash"], hashed, config], sort_keys=True)
    return {"fingerprint": sha256_text(text), **parts}


def _open_work(work: Path, identity: dict[str, Any], rank: int, world_size: int) -> Path | None:
    """Creates or reopens the working folder. Returns the checkpoint to go on from."""
    stamp = work / "fingerprint.json"
    same = stamp.is_file() and read_json(stamp)["fingerprint"] == identity["fingerprint"]
    if not same and any(work.glob("checkpoint-*")):
        raise UserError(
            f"{work}: holds the checkpoints of an unfinished run with other settings or inputs. "
            "Remove that folder to start over, or go back to those settings."
        )
    torch.distributed.barrier()
    if rank == 0:
        work.mkdir(parents=True, exist_ok=True)
        write_json(stamp, {"fingerprint": identity["fingerprint"]})
        remove_incomplete(work)
    torch.distributed.barrier()
    checkpoint = newest_complete(work, world_size)
    if checkpoint and rank == 0:
        print(f"going on from {checkpoint}")
    return checkpoint


def make_shell(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The model without weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def write_model(
    model: Any, state: dict[str, torch.Tensor], folder: Path, shell: LlavaForConditionalGeneration | None = None
) -> None:
    """Writes `state`, keyed as in memory, in transformers' format on disk.

    A model loaded under ZeRO-3 has forgotten how its keys are named on disk, so that a fresh one without weights does it.

    Args:
        shell: that fresh one, where ZeRO-3 is at work and none can be made.
    """
    if model.config.tie_word_embeddings:
        state = {key: value for key, value in state.items() if key != "lm_head.weight"}
    formats = {value.dtype for value in state.values() if value.is_floating_point()}
    target: Any = shell or make_shell(model.config)
    target.to(dtype=formats.pop() if len(formats) == 1 else torch.float32)  # config.json names it, and readers load in it
    target.config.use_cache = True  # Trainer switches it off in the model's
    target.generation_config = model.generation_config
    target.save_pretrained(folder, state_dict=state)


def _finish(stage: _Stage, out: Path, record: dict[str, Any]) -> None:
    """Gathers the weights on the main process and puts the finished folder in place."""
    trainer = stage.trainer
    state = trainer.gathered_state()
    if stage.rank == 0:
        with atomic_folder(out) as folder:
            release(trainer)
            stage.write(state, folder)
            del state
            if stage.shell is not None:
                check_loads(folder)
            record["losses"] = [row for row in read_jsonl(stage.work / METRICS) if "loss" in row]
            shutil.copy(stage.work / METRICS, folder)
            if (stage.work / "runs").is_dir():
                shutil.copytree(stage.work / "runs", folder / "runs")
            stage.ledger.write(folder / "dropped.jsonl")
            save_settings(stage.settings, folder / "config.yaml")
            write_json(folder / "train.json", record)
        shutil.rmtree(stage.work)
        if stage.shell is None:
            print(f"{out} holds adapters; for a model that transformers loads by itself: lmm merge {out}")
        print(f"wrote {out}: {stage.ledger.summary(len(stage.rows) + len(stage.ledger))}, {record['seconds']:.0f} s")
    else:
        release(trainer)
    torch.distributed.barrier()
