"""`lmm finetune`: build, stage 1 and stage 2 in one process, because DeepSpeed's start-up outweighs a small stage.

In: an encoder folder, a language-model folder, conversation files. Out: `build`, `stage1` and `stage2` below one folder; a
part whose inputs and settings are unchanged is reused, a finished one of others is made again, and an unfinished one of others
is an error: its checkpoints may be worth something.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lift.common.files import read_json
from lmm.build import build, choices
from lmm.combinations import check_combinations
from lmm.data import check_rows, read_sources, require_positions
from lmm.distributed import deepspeed_config, start_process_group
from lmm.folders import content_hash, context_length
from lmm.settings import BuildSettings, FinetuneSettings
from lmm.train import load_processor, make_encoder, train_stage


def finetune(settings: FinetuneSettings) -> Path:
    """Returns the folder of the last stage. Raises UserError as `build` and `train_stage` do."""
    for stage in (settings.stage1, settings.stage2):
        if stage is not None:
            check_combinations(stage, deepspeed_config(stage))
            read_sources(stage.data)  # a mistyped path of stage 2 is not to show after stage 1
    rank, world_size = start_process_group()
    first = settings.out / "build"
    if rank == 0:
        _build_if_needed(settings, first)
    torch.distributed.barrier()
    _check_lengths(settings, first, rank, world_size)
    trained = train_stage(first, settings.out / "stage1", settings.stage1, replace=True)
    if settings.stage2 is not None:
        trained = train_stage(trained, settings.out / "stage2", settings.stage2, replace=True)
    return trained


def _build_if_needed(settings: FinetuneSettings, out: Path) -> None:
    wanted = BuildSettings(
        vision_tower=settings.vision_tower,
        llm=settings.llm,
        out=out,
        chat_template=settings.chat_template,
        precision=settings.stage1.precision,
        seed=settings.seed,
    )
    if out.exists():
        record = read_json(out / "build.json", "the record of an earlier build")
        inputs = {"vision_tower_hash": content_hash(settings.vision_tower), "llm_hash": content_hash(settings.llm)}
        if record.items() >= inputs.items() and record.get("choices") == choices(wanted):
            print(f"{out}: finished already, reused")
            return
        shutil.rmtree(out)
    build(wanted)


def _check_lengths(settings: FinetuneSettings, model: Path, rank: int, world_size: int) -> None:
    """A stage 2 with samples beyond the language model's positions is not to show after stage 1.

    Costs a pass over the text, and only where max_length exceeds the positions.
    """
    processor, llava = load_processor(model)
    positions = context_length(llava.text_config)
    for name, stage in (("stage1", settings.stage1), ("stage2", settings.stage2)):
        if stage is None:
            continue
        encoder = make_encoder(processor, llava, stage, model)
        if stage.max_length > positions:
            rows = read_sources(stage.data)
            checks = check_rows(rows, encoder, stage.workers, rank, world_size, decode=False)
            rows.lengths[:] = [0 if check.cause else check.length - check.cut for check in checks]
            require_positions(rows, positions, f"{name}.max_length")
