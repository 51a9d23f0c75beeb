"""Training runs in processes of their own, for tests that kill them; a fork server imports this, so that they start at once."""

from __future__ import annotations

import os

import tiny_lmm  # noqa: F401  # sets the number of threads before torch is imported
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pathlib import Path

import deepspeed  # noqa: F401
import torch.utils.tensorboard

from lmm.quiet import quiet
from lmm.settings import StageSettings
from lmm.train import train_stage

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train_in_this_process(model: Path, out: Path, settings: StageSettings) -> None:
    for name in LAUNCHER:  # left by training inside the tests' own process
        os.environ.pop(name, None)
    quiet()
    torch.set_num_threads(1)
    train_stage(model, out, settings)
