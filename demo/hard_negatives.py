"""Hard negatives of SugarCrepe's seven kinds (arXiv 2306.14610): a caption minimally changed so that it becomes false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from demo.scene import COLOURS, RELATIONS, SHAPES, SIZES, Description, Mention, Scene, pick

MOST_TRIES = 20


def hard_negative(kind: str, scene: Scene, caption: Description, rng: np.random.Generator) -> Description | None:
    """A false description that differs from `caption` as `kind` says, or None when the caption allows none (one object)."""
    for _ in range(MOST_TRIES):
        changed = KINDS[kind](scene, caption, rng)
        if changed is not None and changed != caption and not changed.holds(scene):
            return changed
    return None


def _other(values: tuple[str, ...], value: str, rng: np.random.Generator) -> str:
    return pick(rng, [candidate for candidate in values if candidate != value])


def _with_mention(caption: Description, place: int, mention: Mention) -> Description:
    mentions = list(caption.mentions)
    mentions[place] = mention
    return replace(caption, mentions=tuple(mentions))


def _replace_object(scene: Scene, caption: Description, rng: np.random.Generator) -> Description:
    place = int(rng.integers(len(caption.mentions)))
    mention = caption.mentions[place]
    return _with_mention(caption, place, replace(mention, shape=_other(SHAPES, mention.shape, rng)))


def _replace_attribute(scene: Scene, caption: Description, rng: np.random.Generator) -> Description:
    place = int(rng.integers(len(caption.mentions)))
    mention = caption.mentions[place]
    return _with_mention(caption, place, replace(mention, colour=_other(tuple(COLOURS), mention.colour, rng)))


def _replace_relation(scene: Scene, caption: Description, rng: np.random.Generator) -> Description | None:
    return replace(caption, relation=_other(RELATIONS, caption.relation, rng)) if caption.relation else None


def _swap_objects(scene: Scene, caption: Description, rng: np.random.Generator) -> Description | None:
    if len(caption.mentions) < 2:
        return None
    first, second, *rest = caption.mentions
    return replace(caption, mentions=(replace(first, shape=second.shape), replace(second, shape=first.shape), *rest))


def _swap_attributes(scene: Scene, caption: Description, rng: np.random.Generator) -> Description | None:
    if len(caption.mentions) < 2:
        return None
    first, second, *rest = caption.mentions
    return replace(caption, mentions=(replace(first, colour=second.colour), replace(second, colour=first.colour), *rest))


def _add_object(scene: Scene, caption: Description, rng: np.random.Generator) -> Description:
    added = Mention(pick(rng, tuple(COLOURS)), pick(rng, SHAPES))
    return replace(caption, mentions=(*caption.mentions, added))


def _add_attribute(scene: Scene, caption: Description, rng: np.random.Generator) -> Description:
    place = int(rng.integers(len(caption.mentions)))
    return _with_mention(caption, place, replace(caption.mentions[place], size=pick(rng, tuple(SIZES))))


KINDS: dict[str, Callable[[Scene, Description, np.random.Generator], Description | None]] = {
    "replace_obj": _replace_object,
    "replace_att": _replace_attribute,
    "replace_rel": _replace_relation,
    "swap_obj": _swap_objects,
    "swap_att": _swap_attributes,
    "add_obj": _add_object,
    "add_att": _add_attribute,
}
"""SugarCrepe's file names to the change that makes the negative."""
