"""Preemption: a scheduler's SIGTERM becomes a checkpoint and an exit status that asks to be started again."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class PreemptionWatch:
    """Between `with` and its end, SIGTERM is noted instead of ending the process."""

    def __enter__(self) -> PreemptionWatch:
        self._noted = False
        self._before = signal.signal(signal.SIGTERM, self._note)
        # on the host, so that asking does not wait for the GPU
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def requested(self) -> bool:
        """True on every process as soon as one of them was asked to end; all have to call it together."""
        if self._group is None:
            return self._noted
        noted = torch.tensor([int(self._noted)])
        dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._group)
        return bool(noted)
