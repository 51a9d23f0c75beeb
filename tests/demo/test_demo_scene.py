"""Captions are true, hard negatives are false, and pixels show what the scene says."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from demo.hard_negatives import KINDS, hard_negative
from demo.scene import COLOURS, Description, Mention, Scene, SceneObject, long_caption, random_scene, render, short_caption


def test_same_seed_same_scene_and_pixels() -> None:
    first, second = (random_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert np.array_equal(np.asarray(render(first, 64)), np.asarray(render(second, 64)))


def test_objects_lie_where_the_scene_says_in_their_colour() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = random_scene(rng)
        pixels = np.asarray(render(scene, 64))
        assert len({thing.place for thing in scene.objects}) == len(scene.objects)
        assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            quadrant = pixels[32 * thing.row : 32 * thing.row + 32, 32 * thing.column : 32 * thing.column + 32]
            assert (quadrant == COLOURS[thing.colour]).all(axis=2).sum() > 10
        empty = set(range(4)) - {thing.place for thing in scene.objects}
        for place in empty:
            row, column = place // 2, place % 2
            assert (pixels[32 * row + 2 : 32 * row + 30, 32 * column + 2 : 32 * column + 30] == scene.background).all()


def _object(colour: str, shape: str, place: int, size: str = "small") -> SceneObject:
    return SceneObject(colour, shape, size, place, (0.0, 0.0))


def test_descriptions_by_hand() -> None:
    scene = Scene((_object("red", "circle", 0), _object("blue", "square", 3, "large")), 230)
    red, blue = Mention("red", "circle"), Mention("blue", "square")
    assert Description((red, blue), "left of").text() == "a red circle left of a blue square"
    assert Description((red, blue), "left of").holds(scene)
    assert Description((red, blue), "above").holds(scene)
    assert not Description((blue, red), "left of").holds(scene)
    assert not Description((red, red)).holds(scene), "two mentions need two objects"
    assert Description((Mention("blue", "square", "large"),)).holds(scene)
    assert not Description((Mention("blue", "square", "small"),)).holds(scene)
    assert Mention("orange", "bar").text() == "an orange bar"
    assert long_caption(scene) == "a small red circle at the top left , a large blue square at the bottom right ."


@pytest.mark.parametrize("kind", list(KINDS))
def test_captions_hold_and_hard_negatives_do_not(kind: str) -> None:
    rng = np.random.default_rng([7, *kind.encode()])
    made = 0
    for _ in range(300):
        scene = random_scene(rng)
        caption = short_caption(scene, rng)
        assert caption.holds(scene)
        negative = hard_negative(kind, scene, caption, rng)
        if negative is not None:
            made += 1
            assert not negative.holds(scene)
            assert negative.text() != caption.text()
            grows = len(negative.mentions) - len(caption.mentions)
            assert grows == (kind == "add_obj")
            if kind.startswith("swap"):
                assert sorted(negative.text().split()) == sorted(caption.text().split())
    assert made > 100


def test_no_split_repeats_a_short_cycle() -> None:
    rng = np.random.default_rng(0)
    scenes = [json.dumps([thing.colour for thing in random_scene(rng).objects]) for _ in range(200)]
    assert sum(a == b for a, b in pairwise(scenes)) < 20
