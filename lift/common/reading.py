"""Reading ahead: what the next batch needs is loaded by threads while this one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def read_ahead(
    pool: Executor, load: Callable[[Item], Loaded], items: Sequence[Item], size: int
) -> Iterator[tuple[int, list[Loaded]]]:
    """Number of the first item and `load` of each, batch by batch; at most two batches are held."""
    waiting = [pool.submit(load, item) for item in items[:size]]
    for start in range(0, len(items), size):
        current, waiting = waiting, [pool.submit(load, item) for item in items[start + size : start + 2 * size]]
        yield start, [future.result() for future in current]
