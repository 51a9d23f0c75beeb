"""Labels: against the original LLaVA's where it is right, and on conversations whose supervised text is written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_lmm import make_tokenizer

from lift.common.errors import UserError
from lmm.conversation import IGNORED_LABEL, ConversationEncoder, load_template, parse_row
from lmm.faults import SampleFault
from lmm.images import NamedImages
from lmm.inspect_mask import mask_row
from lmm.recipes import encoder_of_folder
from lmm.rows import Row

FIXTURE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "llava_masks"
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"reference labels of the original LLaVA are not at {FIXTURE}")
IMAGES = Path("images")


def encoder_for(tokenizer: Any, template: str, tokens_per_image: int = 1, max_length: int = 100_000) -> ConversationEncoder:
    text = template if "{" in template else load_template(template)
    return ConversationEncoder(tokenizer, text, template[:20], "<image>", tokens_per_image, max_length)


def supervised(encoder: ConversationEncoder, row: dict[str, Any]) -> list[str]:
    """The supervised runs of tokens, as text."""
    tokens = encoder.encode(parse_row(row, IMAGES).messages)
    runs: list[list[int]] = []
    previous = IGNORED_LABEL
    for label in tokens.labels:
        if label != IGNORED_LABEL:
            runs = [*runs, []] if previous == IGNORED_LABEL else runs
            runs[-1].append(label)
        previous = label
    return [encoder.tokenizer.decode(run) for run in runs]


def row(*values: str, image: Any = None) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": "x", "conversations": turns} | ({"image": image} if image else {})


# What the reference does with each sample of the fixture where ours differs; every other sample has its ids and labels.
# `trained`: it has our ids, but masks everything ("tokenization mismatch"). `cut`: it cuts at 512 tokens.
# The rest: why ours drops the sample. The original refuses it too (REFUSED), or trains a text that is not what the row says:
# it leaves out a turn, an image or a marker, or counts fewer images than markers.
DIFFERENCES = {
    "answer_has_ASSISTANT": "trained",
    "answer_has_ASSISTANT_2nd": "trained",
    "answer_has_eos": "trained",
    "answer_has_unk": "trained",
    "human_last": "trained",
    "long_text": "cut",
    "long_answer_text": "cut",
    "two_image_tokens": "image count",
    "two_turn_images": "image count",
    "empty_answer": "empty answer",
    "empty_answer_text": "empty answer",
    "empty_middle_answer": "empty answer",
    "gpt_first": "starts with an answer",
    "roles_not_alternating": "roles do not alternate",
    "literal_image_no_image_key": "image count",
    "image_key_no_token": "image count",
    "image_in_answer": "image in an answer",
}
PLAIN_DIFFERENCES = {
    "p_empty": "empty answer",
    "p_image_in_caption": "image in an answer",
    "p_no_token": "image count",
    "p_multi_turn": "refused by the template",
}
REFUSED = {"roles_not_alternating", "p_no_token", "p_multi_turn"}
TOKENIZERS = ["tok_slow_legacy_true", "tok_slow_legacy_false", "tok_fast_from_legacy_true", "tok_fast_from_legacy_false"]
CASES = [
    ("conversations.json", "vicuna_v1", "v1", DIFFERENCES, 14),
    ("conversations_plain.json", "plain", "plain", PLAIN_DIFFERENCES, 8),
]


@needs_fixture
@pytest.mark.parametrize("folder", TOKENIZERS)
@pytest.mark.parametrize(("file", "template", "short", "differences", "equal"), CASES, ids=["vicuna_v1", "plain"])
def test_every_sample_of_the_original_llava_is_accounted_for(
    folder: str, file: str, template: str, short: str, differences: dict[str, str], equal: int
) -> None:
    """A folder's `legacy` decides, as in the original code, which uses the slow tokenizer."""
    reference = json.loads((FIXTURE / f"out_{short}_slow_{folder[folder.index('legacy') :]}.json").read_text())["results"]
    encoder = encoder_of_folder(FIXTURE / folder, template, 1, 100_000)
    compared = 0
    for sample in json.loads((FIXTURE / file).read_text()):
        name, expected = sample["id"], reference[sample["id"]]
        difference = differences.get(name)
        assert bool(expected["error"]) == (name in REFUSED)
        if difference not in (None, "trained", "cut"):
            with pytest.raises(SampleFault) as fault:
                encoder.encode(parse_row(sample, IMAGES).messages)
            assert fault.value.cause == difference, name
            continue
        tokens = encoder.encode(parse_row(sample, IMAGES).messages)
        count = 512 if difference == "cut" else len(tokens.input_ids)
        assert tokens.input_ids[:count] == expected["input_ids"], name
        if difference == "trained":
            assert set(expected["labels"]) == {IGNORED_LABEL}, name
            answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
            assert supervised_text(encoder, sample) == [f" {answer}</s>" for answer in answers], name
        else:
            assert tokens.labels[:count] == expected["labels"], name
            compared += difference is None
    assert compared == equal
    assert differences.keys() <= reference.keys()


def supervised_text(encoder: ConversationEncoder, sample: dict[str, Any]) -> list[str]:
    masked = mask_row(Row(sample["id"], sample, NamedImages()), encoder)
    return [masked.text[start:stop] for start, stop in masked.spans]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("vicuna_v1", ("Hi", "Yes.", "More?", "No."), [" Yes.<eos>", " No.<eos>"]),
        ("vicuna_v1", ("Hi", "USER: a ASSISTANT: b"), [" USER: a ASSISTANT: b<eos>"]),
        ("vicuna_v1", ("Hi", "Yes.", "And then?"), [" Yes.<eos>"]),
        ("vicuna_v1", ("Hi", "naïve 猫 🐱"), [" naïve 猫 🐱<eos>"]),
        ("plain", ("Describe it.", "a red cube"), ["a red cube\n"]),
        (CHATML, ("Hi", "Yes.", "More?", "No."), ["Yes.<|im_end|>\n", "No.<|im_end|>\n"]),
        (PARTS_ONLY, ("Hi", "Yes."), ["Yes.<eos>"]),
    ],
)
def test_supervised_text(template: str, values: tuple[str, ...], expected: list[str]) -> None:
    encoder = encoder_for(make_tokenizer(), template)
    assert supervised(encoder, row(*values)) == expected


def test_images_expand_and_are_never_supervised() -> None:
    encoder = encoder_for(make_tokenizer(), "vicuna_v1", tokens_per_image=4)
    tokens = encoder.encode(parse_row(row("What is <image> this?", "A cube.", image="a.png"), IMAGES).messages)
    image_id = encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert tokens.input_ids.count(image_id) == 4
    assert image_id not in tokens.labels
    assert "USER: <image><image><image><image>\nWhat is  this?" in encoder.tokenizer.decode(tokens.input_ids)


def test_several_images_stay_where_they_are() -> None:
    encoder = encoder_for(make_tokenizer(), "vicuna_v1", tokens_per_image=2)
    messages = parse_row(row("<image> or <image>?", "The first.", image=["a.png", "b.png"]), IMAGES).messages
    assert "USER: <image><image> or <image><image>?" in encoder.render(messages)[0]


def test_bos_is_not_doubled() -> None:
    tokenizer = make_tokenizer()
    encoder = encoder_for(tokenizer, "{{ bos_token }}" + CHATML)
    ids = encoder.encode(parse_row(row("Hi", "Yes."), IMAGES).messages).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_template_that_rewrites_earlier_turns_is_named() -> None:
    forgets = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}|{% endif %}{% endfor %}"
    encoder = encoder_for(make_tokenizer(), forgets)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encoder.encode(parse_row(row("Hi", "Yes.", "More?", "No."), IMAGES).messages)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("text", "malformed row"),
        ({"conversations": []}, "malformed row"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role"),
        (row("Hi"), "no answer"),
        (row("Hi", "  "), "empty answer"),
        (row("Hi", "a <image>", image="a.png"), "image in an answer"),
        (row("<image>\nHi", "Yes.", image="../a.png"), "image outside its folder"),
    ],
)
def test_faults_are_named(value: Any, cause: str) -> None:
    with pytest.raises(SampleFault) as fault:
        parse_row(value, IMAGES)
    assert fault.value.cause == cause


def test_too_long_is_dropped_not_cut() -> None:
    encoder = encoder_for(make_tokenizer(), "plain", tokens_per_image=16, max_length=20)
    assert len(encoder.encode(parse_row(row("<image>", "abc", image="a.png"), IMAGES).messages).input_ids) == 20
    with pytest.raises(SampleFault, match="longer than max_length"):
        encoder.encode(parse_row(row("<image>", "abcd", image="a.png"), IMAGES).messages)


def test_too_long_is_cut_when_asked_but_no_image_nor_all_answers() -> None:
    encoder = encoder_for(make_tokenizer(), "plain", tokens_per_image=16, max_length=20)
    encoder.cuts = True
    whole = encoder.tokens(parse_row(row("<image>", "abcdef", image="a.png"), IMAGES).messages)
    cut = encoder.fit(whole)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:20], whole.labels[:20]) and len(whole.input_ids) > 20
    encoder.max_length = 15  # within the image
    with pytest.raises(SampleFault, match="with an image beyond max_length"):
        encoder.fit(whole)
    encoder.max_length = 16  # the image alone
    with pytest.raises(SampleFault, match="with no answer within max_length"):
        encoder.fit(whole)
