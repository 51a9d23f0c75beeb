"""DeepSpeed's surroundings: process group, configuration, and what it must not do (compile, chatter, ask for MPI).

Works in a single process without a launcher and under torchrun or the deepspeed launcher, on CPU (gloo) and GPU (NCCL).
"""

from __future__ import annotations

import gc
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch

from lift.common.errors import UserError
from lift.common.files import read_json
from lmm.settings import StageSettings

CONFIG_FOLDER = Path(__file__).parent / "deepspeed_configs"


def start_process_group() -> tuple[int, int]:
    """Starts torch.distributed once per process through DeepSpeed. Returns (rank, number of processes)."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError("deepspeed is not installed. Install the extra: pip install 'lift-toolkit[lmm]'.") from error
    from deepspeed import ops
    from deepspeed.utils import logger

    # The shared-memory collective is compiled at first use, for minutes and only with a C++ compiler; gloo does without it.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("ERROR")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # gathering objects sends through the current device
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def deepspeed_config(settings: StageSettings) -> dict[str, Any]:
    """The shipped configuration of the ZeRO stage, or the user's.

    Raises:
        UserError: the user's file is not one this training can run with; the key is named.
    """
    path = settings.deepspeed or CONFIG_FOLDER / f"zero{settings.zero_stage}{'_offload' * settings.offload}.json"
    if settings.offload and settings.zero_stage != 3:
        raise UserError("offload: parameters can only be moved to the CPU where they are partitioned. Set zero_stage to 3.")
    config = read_json(path, "a DeepSpeed configuration")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(config).__name__}.")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"{path}: expected no '{key}' block (it would undo the projector's learning rate). Remove it.")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.get(key) != "auto":
            raise UserError(f'{path}: expected "{key}": "auto", found {json.dumps(config.get(key))}. Batch sizes are settings.')
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise UserError(f'{path}: expected "stage3_gather_16bit_weights_on_model_save": true; without it no model is written.')
    return config


def release(trainer: Any) -> None:
    """Frees the engine and its global state, so that another stage, or plain transformers, can run in this process."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    trainer.model_wrapped = trainer.deepspeed = trainer.model = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
