"""The order of samples is a pure function of (seed, step), and the same for LIFT and CLIP."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lift.common.ledger import DropLedger
from lift.data import make_loader
from lift.order import batch_positions
from lift.settings import PretrainSettings, SourceSettings, VisionSettings
from lift.sources import read_sources


class NoText:
    def __call__(self, caption_keys: list[str], captions: list[str]) -> dict:
        return {}

    def is_usable(self, caption_key: str) -> bool:
        return True


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
    samples = [s for shard in read_sources(settings.data, DropLedger()) for s in shard.samples]
    loader = make_loader(samples, settings, NoText(), steps, rank, world)
    return [(batch.keys, batch.pixels_B3HW.numpy()) for batch in loader]


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
