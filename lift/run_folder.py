"""The run folder of a pretraining: resolved settings, environment, metrics, checkpoints, drop ledger.

Everything a later call needs to go on exactly where this one stopped, and everything a reader needs to trust its numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lift.common.environment import describe_environment
from lift.common.errors import UserError
from lift.common.files import atomic_folder, read_json, read_jsonl, read_whole_rows, write_json, write_jsonl
from lift.common.ledger import DropLedger
from lift.common.settings import save_settings, to_plain
from lift.settings import PretrainSettings

FREE_TO_CHANGE = frozenset(
    {
        "workers", "log_every", "checkpoint_every", "max_drop_fraction",
        "micro_batch_size", "gradient_checkpointing", "compile", "loss_tile",
    }
)  # fmt: skip
"""Settings that do not change the weights, apart from rounding (those in the second line); a run may go on with others."""
CHECKPOINTS_KEPT = 2
BEST = "best_"
"""Begins the name of the checkpoint with the best validation, which lies beside those of the newest steps."""
TOKENIZER = "tokenizer"
"""Folder of the CLIP baseline's tokenizer."""
TEXT_ENCODER = "text_encoder.json"
"""Description of the text encoder that LIFT was aligned to."""


def open_run(settings: PretrainSettings, content: str, samples: int) -> None:
    """Creates the run folder, or checks that what has been trained there came from the same settings and data.

    Args:
        content: hash of the keys and captions of the data.
    Raises:
        UserError: the folder holds a run with other settings or data; the first difference is named.
    """
    now = to_plain(settings) | {"samples_sha256": content}
    saved = settings.out / "config.yaml"
    if finished(settings.out) is not None or checkpoints(settings.out):
        before = yaml.safe_load(saved.read_text()) | read_json(settings.out / "data.json")
        for key in sorted(now.keys() - FREE_TO_CHANGE):
            if before.get(key) != now[key]:
                raise UserError(
                    f"{settings.out}: holds a run with {key}={before.get(key)}, this call says {now[key]}. "
                    "Give another --out, or delete that folder."
                )
    else:  # what an earlier run left that came to no checkpoint is not this run's
        for left in (settings.out / TOKENIZER, settings.out / TEXT_ENCODER, *best_checkpoints(settings.out)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    if finished(settings.out) is None:
        save_settings(settings, saved)
        write_json(settings.out / "data.json", {"samples_sha256": content, "samples": samples})
        write_json(settings.out / "environment.json", describe_environment())


def finished(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, else None."""
    path = run / "finished.json"
    return read_json(path) if path.is_file() else None


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8))


def save_checkpoint(
    run: Path, step: int, seconds: float, model: nn.Module, optimizer: torch.optim.Optimizer, ledger: DropLedger
) -> None:
    """Writes model, optimizer, data position (the step) and ledger beside and renames; older ones beyond two are removed."""
    with atomic_folder(run / "checkpoints" / f"step_{step:08d}") as folder:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        ledger.write(folder / "dropped.jsonl")
        write_json(folder / "state.json", {"step": step, "seconds": seconds})
    for old in checkpoints(run)[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def save_best(run: Path, step: int, score: float, model: nn.Module, validation: dict[str, float]) -> None:
    """Keeps the weights with the highest `score` so far in checkpoints/best_STEP; of equal ones the first."""
    before = best_checkpoints(run)
    if before and read_json(before[-1] / "state.json")["score"] >= score:
        return
    with atomic_folder(run / "checkpoints" / f"{BEST}{step:08d}") as folder:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
        write_json(folder / "state.json", {"step": step, "score": score, **validation})
    for old in before:
        shutil.rmtree(old)


def best_checkpoints(run: Path) -> list[Path]:
    """The checkpoint with the best validation; after a kill between two renames also the one before, which comes first."""
    found = (run / "checkpoints").glob(BEST + "[0-9]" * 8)
    return sorted(found, key=lambda folder: (read_json(folder / "state.json")["score"], folder.name))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ledger: DropLedger) -> tuple[int, float]:
    """Fills model, optimizer and ledger; returns the steps done and the seconds they took."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    for row in read_jsonl(folder / "dropped.jsonl"):
        ledger.drop(row["key"], row["cause"], row["detail"])
    state = read_json(folder / "state.json")
    return int(state["step"]), float(state["seconds"])


class Metrics:
    """`metrics.jsonl` and TensorBoard events; rows after the step that a run resumes from are taken back.

    Only the process that is `enabled` writes.
    """

    def __init__(self, run: Path, first_step: int, enabled: bool) -> None:
        self.run, self.first_step, self.enabled = run, first_step, enabled

    def __enter__(self) -> Metrics:
        if self.enabled:
            path = self.run / "metrics.jsonl"
            if path.is_file():
                write_jsonl(path, [row for row in read_whole_rows(path) if row["step"] <= self.first_step])
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.first_step + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()

    def log(self, row: dict[str, Any]) -> None:
        if not self.enabled:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, row["step"])
