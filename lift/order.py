"""The order of samples: a pure function of (seed, epoch, step), so that it depends neither on workers nor on processes.

An epoch is a random permutation that is computed, not stored: a Feistel network on the smallest even number of bits that
holds all samples, walked until it falls inside. Any place of any epoch is had at once, whether of a thousand samples or of
a billion, in no memory.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6


def permuted(places: np.ndarray, samples: int, seed: int, epoch: int) -> np.ndarray:
    """Sample index (int64) at each of `places` (0 to samples - 1) of the epoch."""
    half = max(1, ((samples - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    out = places.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        out[outside] = _feistel(out[outside], keys, half)
        outside = out >= samples
    return out.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """A bijection of the numbers of 2 * `half` bits (Luby and Rackoff, 1988)."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << np.uint64(half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def batch_positions(seed: int, step: int, batch_size: int, samples: int) -> list[tuple[int, int]]:
    """(epoch, sample index) of every member of the global batch of `step`.

    Epochs follow each other without a gap: a batch may span two of them, so that no sample is left out at an epoch's end.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(places, samples)
    found = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permuted(offsets[here], samples, seed, int(epoch))
    return list(zip(epochs.tolist(), found.tolist(), strict=True))
