"""What the processes of a run decide together between two steps: to stop when a scheduler asks one of them to.

A scheduler's SIGTERM becomes a checkpoint and an exit status that asks to be started again. A process that stops alone would
leave the others waiting for it.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class Votes:
    """Between `with` and its end, SIGTERM is noted instead of ending the process."""

    def __enter__(self) -> Votes:
        self._noted = False
        self._before = signal.signal(signal.SIGTERM, self._note)
        # on the host, so that asking does not wait for the GPU
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        return self

    def __exit__(self, *error: object) -> None:
        # a launcher that sees one process end signals the others, which are about to end with the same status
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self._noted else self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def count(self, dropped: int = 0) -> tuple[bool, int]:
        """Whether any process was asked to end, and the sum of `dropped` over all; all have to call it together."""
        if self._group is None:
            return self._noted, dropped
        votes = torch.tensor([int(self._noted), dropped])
        dist.all_reduce(votes, group=self._group)
        self._noted = bool(votes[0])
        return self._noted, int(votes[1])


def outlive_preemption(worker: int) -> None:
    """For a data loader's workers: a scheduler signals them too, but the main process needs their batches to end its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
