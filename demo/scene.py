"""Scenes of one to four objects on a 2 x 2 grid: drawn from a seed, rendered to pixels, and asked whether a description holds.

A description is structured (`Description`), its text is derived from it, and `holds` decides its truth. So every caption is
known to be true and every hard negative to be false, whatever else is in the scene.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 210, 30),
    "purple": (140, 70, 180),
    "orange": (255, 127, 14),
    "cyan": (40, 200, 220),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "bar")
SIZES = {"small": 0.10, "large": 0.19}
"""Radius as a share of the image's side."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
SUPERSAMPLING = 4

_COLOUR_NAMES, _SIZE_NAMES = tuple(COLOURS), tuple(SIZES)


@dataclass(frozen=True)
class SceneObject:
    colour: str
    shape: str
    size: str
    place: int
    """Index into PLACES."""
    shift: tuple[float, float]
    """Offset from the centre of its place, as a share of the image's side."""

    @property
    def row(self) -> int:
        return self.place // 2

    @property
    def column(self) -> int:
        return self.place % 2

    @property
    def place_name(self) -> str:
        return PLACES[self.place]


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: int
    """Grey level."""


@dataclass(frozen=True)
class Mention:
    """An object as a description names it; a size of None says nothing about the size."""

    colour: str
    shape: str
    size: str | None = None

    def text(self) -> str:
        words = [word for word in (self.size, self.colour, self.shape) if word]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    def fits(self, thing: SceneObject) -> bool:
        return (self.colour, self.shape) == (thing.colour, thing.shape) and self.size in (None, thing.size)


@dataclass(frozen=True)
class Description:
    """The mentioned objects; with a relation, the first stands in it to the second."""

    mentions: tuple[Mention, ...]
    relation: str | None = None

    def text(self) -> str:
        texts = [mention.text() for mention in self.mentions]
        if self.relation:
            texts[:2] = [f"{texts[0]} {self.relation} {texts[1]}"]
        return " and ".join(texts)

    def holds(self, scene: Scene) -> bool:
        """Whether distinct objects of the scene can be found for all mentions such that the relation is true."""
        if len(self.mentions) > len(scene.objects):
            return False
        return any(
            all(mention.fits(thing) for mention, thing in zip(self.mentions, chosen, strict=True))
            and (self.relation is None or is_related(chosen[0], self.relation, chosen[1]))
            for chosen in itertools.permutations(scene.objects, len(self.mentions))
        )


def is_related(first: SceneObject, relation: str, second: SceneObject) -> bool:
    """Objects on a diagonal stand in two relations to each other."""
    return {
        "left of": first.column < second.column,
        "right of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """One of `values`; ten times faster than `Generator.choice`, which makes an array of them first."""
    return values[int(rng.integers(len(values)))]


def random_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """One to four objects (or `count`) in different places, no two of the same colour and shape.

    A third of the later objects take the first one's colour, so that there is something to count and to tell apart.
    """
    count = int(rng.integers(1, 5)) if count is None else count
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        repeats = looks and rng.random() < 1 / 3
        look = (looks[0][0] if repeats else pick(rng, _COLOUR_NAMES), pick(rng, SHAPES))
        if look not in looks:
            looks.append(look)
    places = rng.permutation(len(PLACES))[:count]
    objects = [
        SceneObject(colour, shape, pick(rng, _SIZE_NAMES), int(place), (_shift(rng), _shift(rng)))
        for (colour, shape), place in zip(looks, places, strict=True)
    ]
    return Scene(tuple(objects), int(rng.integers(215, 246)))


def _shift(rng: np.random.Generator) -> float:
    return float(rng.uniform(-0.05, 0.05))


def short_caption(scene: Scene, rng: np.random.Generator) -> Description:
    """Colour and shape of every object, and a true relation between the first two."""
    mentions = tuple(Mention(thing.colour, thing.shape) for thing in scene.objects)
    if len(mentions) == 1:
        return Description(mentions)
    first, second = scene.objects[:2]
    return Description(mentions, pick(rng, [r for r in RELATIONS if is_related(first, r, second)]))


def long_caption(scene: Scene) -> str:
    """Size, colour, shape and place of every object, in reading order."""
    parts = [
        f"{Mention(thing.colour, thing.shape, thing.size).text()} at the {thing.place_name}"
        for thing in sorted(scene.objects, key=lambda thing: thing.place)
    ]
    return f"{' , '.join(parts)} ."


def render(scene: Scene, size: int) -> Image.Image:
    """RGB image of `size` x `size` pixels, antialiased."""
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), (scene.background,) * 3)
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        x = side * (0.25 + 0.5 * thing.column + thing.shift[0])
        y = side * (0.25 + 0.5 * thing.row + thing.shift[1])
        _draw(draw, thing.shape, x, y, side * SIZES[thing.size], COLOURS[thing.colour], (scene.background,) * 3)
    return image.resize((size, size), Image.Resampling.BOX)


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...], background: tuple[int, ...]
) -> None:
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if shape == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=background)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=colour)
        draw.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=colour)
    elif shape == "bar":
        draw.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], fill=colour)
    else:
        points, depth = (3, 1.0) if shape == "triangle" else (10, 0.42)
        radii = [r if i % 2 == 0 or shape == "triangle" else depth * r for i in range(points)]
        angles = [2 * math.pi * i / points - math.pi / 2 for i in range(points)]
        draw.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for d, a in zip(radii, angles, strict=True)], fill=colour)
