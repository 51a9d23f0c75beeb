"""Captions in another word order (ARO's COCO-Order and Flickr30K-Order, arXiv 2210.01936, section 2.3): a caption comes in, the
caption as it is scored and its perturbations go out, the same ones at each call and on each machine.

ARO draws the perturbations anew at each run, so that its numbers repeat only about. Here the seed is the caption itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from lift.common.errors import UserError

PERTURBATIONS = ("shuffle_nouns_and_adj", "shuffle_allbut_nouns_and_adj", "shuffle_within_trigrams", "shuffle_trigrams")
"""ARO's four, in its order."""
MAX_WORDS = 30
"""Of a caption; ARO cuts off what follows."""
SPACY_MODEL = "en_core_web_sm"
ATTEMPTS = 20
"""Draws until an order differs from the caption's own."""

NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
ADJECTIVES = frozenset({"JJ", "JJR", "JJS"})

Tagger = Callable[[Sequence[str]], list[str]]
"""Penn Treebank tags of the words of a caption, one a word."""


def words_of(caption: str) -> list[str]:
    """Words of a caption as ARO compares it: lower case, without . ! " ( ) * # : ; ~, at most 30 of them."""
    return re.sub(r"""[.!"()*#:;~]""", " ", caption.lower()).split()[:MAX_WORDS]


def perturbed(caption: str, tagger: Tagger) -> dict[str, str]:
    """The perturbations of a caption by name.

    One that cannot change the caption (a single noun and no adjective; words that are all alike) is left out: it could not be
    told from the caption.
    """
    words = words_of(caption)
    tags = tagger(words)
    found: dict[str, str] = {}
    for name in PERTURBATIONS:
        generator = random.Random(f"{name}\n{' '.join(words)}")
        for _ in range(ATTEMPTS):
            order = _ORDERS[name](tags, generator)
            shuffled = [words[place] for place in order]
            if shuffled != words:
                found[name] = " ".join(shuffled)
                break
    return found


def _among(places: list[int], order: list[int], generator: random.Random) -> None:
    """Shuffles the words at `places` among themselves."""
    drawn = [order[place] for place in places]
    generator.shuffle(drawn)
    for place, word in zip(places, drawn, strict=True):
        order[place] = word


def _nouns_and_adjectives(tags: Sequence[str], generator: random.Random) -> list[int]:
    order = list(range(len(tags)))
    for kind in (NOUNS, ADJECTIVES):
        _among([place for place, tag in enumerate(tags) if tag in kind], order, generator)
    return order


def _all_but_nouns_and_adjectives(tags: Sequence[str], generator: random.Random) -> list[int]:
    order = list(range(len(tags)))
    _among([place for place, tag in enumerate(tags) if tag not in NOUNS | ADJECTIVES], order, generator)
    return order


def _trigrams(tags: Sequence[str]) -> list[list[int]]:
    places = list(range(len(tags)))
    return [places[start : start + 3] for start in range(0, len(places), 3)]


def _within_trigrams(tags: Sequence[str], generator: random.Random) -> list[int]:
    trigrams = _trigrams(tags)
    for trigram in trigrams:
        generator.shuffle(trigram)
    return [place for trigram in trigrams for place in trigram]


def _of_trigrams(tags: Sequence[str], generator: random.Random) -> list[int]:
    trigrams = _trigrams(tags)
    generator.shuffle(trigrams)
    return [place for trigram in trigrams for place in trigram]


_ORDERS: dict[str, Callable[[Sequence[str], random.Random], list[int]]] = {
    "shuffle_nouns_and_adj": _nouns_and_adjectives,
    "shuffle_allbut_nouns_and_adj": _all_but_nouns_and_adjectives,
    "shuffle_within_trigrams": _within_trigrams,
    "shuffle_trigrams": _of_trigrams,
}


def spacy_tagger(where: str) -> Tagger:
    """Tags by spaCy's small English model, as ARO uses it.

    Raises:
        UserError: spaCy or the model is not installed; the message names `where` and what to do.
    """
    try:
        import spacy
        from spacy.tokens import Doc

        language: Any = spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise UserError(
            f"{where}: its captions have to be perturbed, and for that nouns and adjectives have to be found, which spaCy and "
            f"its model do; they are not installed ({type(error).__name__}). Run `pip install spacy` and `python -m spacy "
            f"download {SPACY_MODEL}`, or give a file with perturbed captions: items with 'image' and 'caption_options', the "
            "true caption first."
        ) from error

    def tags(words: Sequence[str]) -> list[str]:
        document = Doc(language.vocab, words=list(words))
        for _, component in language.pipeline:
            document = component(document)
        return [token.tag_ for token in document]

    return tags
