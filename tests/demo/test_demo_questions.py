"""Questions: right answers, MMBench's names and prompt, and nothing that gives the answer away in the text."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from demo.questions import LETTERS, TEMPLATES, Question, balanced_questions
from demo.scene import COLOURS, PLACES, SHAPES, Scene, SceneObject
from eval.mmbench import TAXONOMY


def _right_answer(name: str, scene: Scene, text: str) -> str:
    """The answer worked out from the scene and the question's words alone."""
    things = scene.objects
    if name in ("colour", "shape"):
        assert len(things) == 1
        return getattr(things[0], name)
    if name == "count":
        return ("one", "two", "three", "four")[len(things) - 1]
    if name == "shared":
        first, second = things
        equal = [f"the {name}" for name in ("colour", "shape", "size") if getattr(first, name) == getattr(second, name)]
        assert len(equal) <= 1
        return equal[0] if equal else "nothing"
    words = [word.strip("?") for word in text.split()]
    looks = list(zip([w for w in words if w in COLOURS], [w for w in words if w in SHAPES], strict=True))
    named = [next(thing for thing in things if (thing.colour, thing.shape) == look) for look in looks]
    if name == "place":
        return PLACES[named[0].place]
    return _relation(*named)


def _relation(first: SceneObject, second: SceneObject) -> str:
    across, down = first.column - second.column, first.row - second.row
    assert (across == 0) != (down == 0), "one relation only"
    if across:
        return "left of it" if across < 0 else "right of it"
    return "above it" if down < 0 else "below it"


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_answers_are_right_and_balanced(name: str) -> None:
    asked = list(balanced_questions(name, 80, np.random.default_rng(1)))
    for scene, question in asked:
        assert len(set(question.options)) == 4
        assert question.options[question.answer] == _right_answer(name, scene, question.text)
    assert Counter(question.letter for _, question in asked) == dict.fromkeys(LETTERS, 20)
    if TEMPLATES[name].fixed_options:
        assert set(Counter(q.options[q.answer] for _, q in asked).values()) == {20}


def test_majority_guesser_that_sees_only_text_scores_at_chance() -> None:
    """It learns, on half of the questions, how often each option is right given the question's words and the options."""
    right = total = 0
    for name in TEMPLATES:
        questions = [question for _, question in balanced_questions(name, 2000, np.random.default_rng(5))]
        learned: dict[tuple, Counter] = defaultdict(Counter)
        for question in questions[:1000]:
            for key in _views(question):
                learned[key][question.options[question.answer]] += 1
                learned[key, "letter"][question.letter] += 1
        for question in questions[1000:]:
            scores = np.zeros(4)
            for key in _views(question):
                scores += [learned[key][option] for option in question.options]
                scores += [learned[key, "letter"][letter] for letter in LETTERS]
            right += int(np.argmax(scores)) == question.answer
            total += 1
    deviation = np.sqrt(0.25 * 0.75 / total)
    assert abs(right / total - 0.25) < 4 * deviation, f"{right} of {total}"


def _views(question: Question) -> list[tuple]:
    words = tuple(word for word in question.text.split() if word.strip("?") not in (*COLOURS, *SHAPES))
    return [(words,), (words, frozenset(question.options)), (words, question.options), (question.text,)]


def test_rotation_moves_the_answer_along() -> None:
    question = Question("Which?", ("a", "b", "c", "d"), 1)
    rotated = [question.rotated(places) for places in range(4)]
    assert [q.letter for q in rotated] == ["B", "C", "D", "A"]
    assert all(q.options[q.answer] == "b" for q in rotated)
    assert rotated[1].options == ("d", "a", "b", "c")
    assert question.rotated(-1).letter == "A"


def test_names_are_mmbenchs() -> None:
    l2_of_l3 = {l3: l2 for l2_names in TAXONOMY.values() for l2, l3_names in l2_names.items() for l3 in l3_names}
    for template in TEMPLATES.values():
        assert l2_of_l3[template.category] == template.l2_category
    assert {template.category for template in TEMPLATES.values()} == {
        "attribute_recognition",
        "object_localization",
        "spatial_relationship",
        "attribute_comparison",
    }


def test_prompt_is_that_of_lmms_eval() -> None:
    from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_text

    question = Question("What colour is the object?", ("red", "green", "blue", "yellow"), 0)
    row = {"question": question.text, "answer": "A", "category": "c", "L2-category": "l", "index": 0, "hint": None}
    row |= {"source": "demo", "split": "dev", **dict(zip(LETTERS, question.options, strict=True))}
    post_prompt = "\nAnswer with the option's letter from the given choices directly."
    assert mmbench_doc_to_text(row, {"post_prompt": post_prompt}) == question.prompt()
