"""Multiple-choice questions about a scene, in MMBench's form and with MMBench's own names of abilities.

The answer cannot be read off the text: the four options of a question are equally likely to be right, and `balanced_questions`
makes every fixed option right equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from demo.scene import COLOURS, PLACES, RELATIONS, SHAPES, Scene, is_related, random_scene

LETTERS = ("A", "B", "C", "D")
INSTANCE = "finegrained_perception (instance-level)"
CROSS_INSTANCE = "finegrained_perception (cross-instance)"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
COUNTS = ("one", "two", "three", "four")
SHARED = ("the colour", "the shape", "the size", "nothing")
CATEGORY_COLUMNS = ("category", "l2-category")


@dataclass(frozen=True)
class Question:
    text: str
    options: tuple[str, ...]
    answer: int
    """Index into `options`."""

    def rotated(self, places: int) -> Question:
        """The same question with its options moved on by `places`, as circular evaluation asks it again."""
        count = len(self.options)
        return Question(
            self.text, tuple(self.options[(i - places) % count] for i in range(count)), (self.answer + places) % count
        )

    def prompt(self) -> str:
        """As lmms-eval's MMBench task puts it."""
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True))
        return f"{self.text} There are several options:\n{options}\n\n{INSTRUCTION}"

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


Asker = Callable[[Scene, np.random.Generator], Question | None]


@dataclass(frozen=True)
class Template:
    category: str
    """MMBench's L3 ability."""
    l2_category: str
    fixed_options: bool
    """The four options are always the same, so that their answers have to be balanced."""
    ask: Asker
    """The question about a scene, or None where the scene does not allow it."""


def _choose(text: str, answer: str, candidates: Sequence[str], rng: np.random.Generator) -> Question:
    """Options: the four of `candidates` (whose number is a multiple of four) that the answer stands among, from a random start.

    MMBench rotates the options of a question and never shuffles them. Here they stand in one cyclic order from the beginning,
    so that there are few lists of options and a very small language model can learn to read them.
    """
    first = candidates.index(answer) // 4 * 4
    options = tuple(candidates[first : first + 4])
    return Question(text, options, options.index(answer)).rotated(int(rng.integers(4)))


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) != 1:
        return None
    return _choose("What colour is the object?", scene.objects[0].colour, tuple(COLOURS), rng)


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _choose("What shape is the object?", scene.objects[0].shape, SHAPES, rng) if len(scene.objects) == 1 else None


def _ask_place(scene: Scene, rng: np.random.Generator) -> Question:
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    return _choose(f"Where is the {thing.colour} {thing.shape}?", thing.place_name, PLACES, rng)


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    return _choose("How many objects are there?", COUNTS[len(scene.objects) - 1], COUNTS, rng)


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) < 2:
        return None
    first, second = (scene.objects[int(i)] for i in rng.permutation(len(scene.objects))[:2])
    true = [relation for relation in RELATIONS if is_related(first, relation, second)]
    if len(true) != 1:
        return None
    text = f"Where is the {first.colour} {first.shape} relative to the {second.colour} {second.shape}?"
    return _choose(text, f"{true[0]} it", [f"{relation} it" for relation in RELATIONS], rng)


def _ask_shared(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) != 2:
        return None
    first, second = scene.objects
    shared = [first.colour == second.colour, first.shape == second.shape, first.size == second.size]
    if sum(shared) > 1:
        return None
    return _choose("What do the two objects have in common?", SHARED[shared.index(True) if any(shared) else 3], SHARED, rng)


TEMPLATES = {
    "colour": Template("attribute_recognition", INSTANCE, False, _ask_colour),
    "shape": Template("attribute_recognition", INSTANCE, False, _ask_shape),
    "place": Template("object_localization", INSTANCE, True, _ask_place),
    # MMBench counts instances under object localization (arXiv 2307.06281, appendix on L3 abilities).
    "count": Template("object_localization", INSTANCE, True, _ask_count),
    "relation": Template("spatial_relationship", CROSS_INSTANCE, True, _ask_relation),
    "shared": Template("attribute_comparison", CROSS_INSTANCE, True, _ask_shared),
}


def balanced_questions(name: str, count: int, rng: np.random.Generator) -> Iterator[tuple[Scene, Question]]:
    """`count` scenes with a question of template `name`; letters, and the answers of fixed options, are right in turn.

    Scenes are drawn until one has the answer whose turn it is.
    """
    template = TEMPLATES[name]
    turn: list[str] = []
    for number in range(count):
        question = None
        while question is None or (turn and question.options[question.answer] != turn[0]):
            scene = random_scene(rng)
            question = template.ask(scene, rng)
            if question is not None and template.fixed_options and not turn:
                turn = [str(option) for option in rng.permutation(sorted(question.options))]
        turn = turn[1:]
        yield scene, question.rotated(number % len(LETTERS) - question.answer)
