"""The order of samples is a pure function of (seed, step), and the same for LIFT and CLIP."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lift.common.ledger import DropLedger
from lift.data import Pairs, make_loader
from lift.order import batch_positions, permuted
from lift.settings import PretrainSettings, SourceSettings, VisionSettings
from lift.sources import Samples, read_sources


class NoText:
    def __call__(self, step: int, caption_numbers: np.ndarray, keys: list[str], captions: list[str]) -> dict:
        return {"captions": captions}

    def is_usable(self, caption_numbers: np.ndarray) -> np.ndarray:
        return np.ones(len(caption_numbers), bool)


def test_every_sample_once_an_epoch_and_batches_span_epochs() -> None:
    places = [place for step in range(15) for place in batch_positions(3, step, 4, 10)]
    assert [epoch for epoch, _ in places] == [e for e in range(6) for _ in range(10)]
    for epoch in range(6):
        assert sorted(index for e, index in places if e == epoch) == list(range(10))
    assert Counter(places) == Counter(set(places))
    assert places != [place for step in range(15) for place in batch_positions(4, step, 4, 10)]


def settings_for(pairs: Path, objective: str, workers: int = 0) -> PretrainSettings:
    return PretrainSettings(
        data=[SourceSettings(kind="webdataset", path=pairs)],
        out=pairs.parent / objective,
        objective=objective,  # type: ignore[arg-type]
        vision=VisionSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        batch_size=8,
        workers=workers,
    )


def load(settings: PretrainSettings, steps: range, rank: int = 0, world: int = 1) -> list[tuple[list[str], np.ndarray]]:
    """(keys, pixels) of each batch."""
    pairs = Pairs(Samples(read_sources(settings.data, DropLedger())), settings)
    loader = make_loader(pairs, settings, NoText(), steps, rank, world)
    return [(batch.keys, batch.pixels_B3HW.numpy()) for batch in loader]


@pytest.mark.parametrize("samples", [1, 2, 3, 16, 17, 1000])
def test_epoch_is_a_permutation(samples: int) -> None:
    assert sorted(permuted(np.arange(samples), samples, 0, 0)) == list(range(samples))


def test_permutations_are_all_about_equally_likely() -> None:
    """Of 4 things there are 24; over 4,800 epochs each comes 200 times, with a deviation of 14."""
    counts = Counter(tuple(permuted(np.arange(4), 4, seed, epoch)) for seed in range(48) for epoch in range(100))
    assert len(counts) == 24
    assert min(counts.values()) > 140 and max(counts.values()) < 260
    long = permuted(np.arange(20_000), 20_000, 0, 1)
    assert abs(np.corrcoef(long, np.arange(20_000))[0, 1]) < 0.03 and abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.03


def test_a_batch_of_a_billion_samples_needs_no_permutation_in_memory() -> None:
    places = batch_positions(0, 50_000, 16_384, 10**9)
    assert {epoch for epoch, _ in places} == {0} and len({index for _, index in places}) == 16_384
    assert batch_positions(0, 61_035, 16_384, 10**9)[-1][0] == 1  # spans two epochs


def test_every_caption_is_used_in_an_epoch_of_all(pairs: Path) -> None:
    settings = replace(settings_for(pairs, "clip"), captions="all")
    items = Pairs(Samples(read_sources(settings.data, DropLedger())), settings)
    assert len(items) == 48
    loader = make_loader(items, settings, NoText(), range(6), 0, 1)
    seen = [(key, caption) for batch in loader for key, caption in zip(batch.keys, batch.text["captions"], strict=True)]
    assert sorted(seen) == sorted((sample.key, text) for sample in items.samples for text in sample.captions.values())
    first = replace(settings, captions="first")
    for batch in make_loader(Pairs(items.samples, first), first, NoText(), range(3), 0, 1):
        assert all(caption.startswith("picture number") for caption in batch.text["captions"])


def test_lift_and_clip_see_the_same_images_in_the_same_order(pairs: Path) -> None:
    lift = load(settings_for(pairs, "contrastive"), range(6))
    clip = load(settings_for(pairs, "clip"), range(6))
    assert [keys for keys, _ in lift] == [keys for keys, _ in clip]
    for (_, a), (_, b) in zip(lift, clip, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_processes_or_where_one_starts(pairs: Path, workers: int) -> None:
    whole = load(settings_for(pairs, "clip"), range(6))
    other = settings_for(pairs, "clip", workers)
    resumed = load(other, range(3, 6))
    for (keys, pixels), (again, again_pixels) in zip(whole[3:], resumed, strict=True):
        assert keys == again
        assert np.array_equal(pixels, again_pixels)
    halves = [load(other, range(6), rank, 2) for rank in range(2)]
    for step, (keys, pixels) in enumerate(whole):
        assert keys == halves[0][step][0] + halves[1][step][0]
        assert np.array_equal(pixels, np.concatenate([halves[0][step][1], halves[1][step][1]]))
