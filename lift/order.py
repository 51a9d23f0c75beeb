"""The order of samples: a pure function of (seed, epoch, step), so that it depends neither on workers nor on processes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(samples)


def batch_positions(seed: int, step: int, batch_size: int, samples: int) -> list[tuple[int, int]]:
    """(epoch, sample index) of every member of the global batch of `step`.

    Epochs follow each other without a gap: a batch may span two of them, so that no sample is left out at an epoch's end.
    """
    first = step * batch_size
    places = [divmod(place, samples) for place in range(first, first + batch_size)]
    return [(epoch, int(epoch_permutation(seed, epoch, samples)[offset])) for epoch, offset in places]
