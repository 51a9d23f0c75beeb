"""`lift-eval text`: hand-worked figures, pairs mined exactly, real tiny encoders from command line to page, and bad input."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_pretrain

from eval.__main__ import main
from eval.text.measure import Measured, analyse, aucs, exchange, measure
from eval.text.metrics import auc, bootstrap_aucs, rank_correlation, rank_shares
from eval.text.mining import Limits, close_in_words, mine
from eval.text.pairs import Caption, Pair, read_captions, read_pairs, word_overlap, words
from eval.text.sides import TextSide, open_text_encoder
from lift.common.errors import UserError
from lift.train import pretrain

LIMITS = Limits(high_overlap=0.6, low_overlap=0.2, max_pairs=50, max_captions=1000, seed=0)
ATTACK = "<script>alert('x')</script> & a dog"


@pytest.fixture
def encoders(pairs: Path, tiny_llm: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Encoder folders of a tiny LIFT and a tiny CLIP run."""
    for objective in ("contrastive", "clip"):
        pretrain(tiny_pretrain(pairs, tiny_llm, tmp_path / objective, objective))
    return tmp_path / "contrastive" / "encoder", tmp_path / "clip" / "encoder"


def bag_of_words(sentences: list[str]) -> np.ndarray:
    """An encoder that follows words and nothing else: the cosine of two sets of words."""
    vocabulary = sorted({word for sentence in sentences for word in words(sentence)})
    rows = np.array([[word in words(sentence) for word in vocabulary] for sentence in sentences], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a dog chases a cat", "A cat chases a DOG!", 1.0),
        ("a red car", "a blue car", 2 / 4),
        ("it's open", "it is open", 1 / 4),
        ("one", "two", 0.0),
        ("...", "!", 0.0),
    ],
)
def test_word_overlap_by_hand(first: str, second: str, expected: float) -> None:
    assert word_overlap(first, second) == expected


def test_auc_by_hand() -> None:
    # of the six pairings 0.9 wins three; 0.5 wins against 0.1, ties with 0.5 and loses to 0.7
    assert auc(np.array([0.9, 0.5]), np.array([0.1, 0.5, 0.7])) == pytest.approx((3 + 1 + 0.5) / 6)
    with pytest.raises(ValueError, match="at least one pair"):
        auc(np.array([]), np.array([0.1]))
    with pytest.raises(ValueError, match="finite"):
        auc(np.array([np.nan]), np.array([0.1]))


def test_bootstrap_is_paired_seeded_and_covers_what_can_vary() -> None:
    same = np.array([True] * 3 + [False] * 3)
    separated, mixed = np.array([5.0, 6, 7, 1, 2, 3]), np.array([1.0, 6, 3, 2, 5, 0])
    drawn_RK = bootstrap_aucs(np.stack([separated, mixed, mixed]), same, 200, seed=1)
    assert (drawn_RK[:, 0] == 1).all()  # any resample of a clean separation is clean
    assert np.array_equal(drawn_RK[:, 1], drawn_RK[:, 2])
    assert drawn_RK[:, 1].std() > 0.1 and abs(drawn_RK[:, 1].mean() - auc(mixed[same], mixed[~same])) < 0.05
    assert np.array_equal(drawn_RK, bootstrap_aucs(np.stack([separated, mixed, mixed]), same, 200, seed=1))
    found = aucs(np.stack([separated, mixed, mixed]), same, 200, 1)
    assert found["a"]["interval"] == [1.0, 1.0] and found["a_minus_b"]["value"] == pytest.approx(1 - found["b"]["value"])


def test_rank_correlation_and_shares_by_hand() -> None:
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation(np.array([0.1, 0.2, 0.3, 9.0]), np.array([2.0, 1.0, 40.0, 3.0])) == pytest.approx(0.6)
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None
    assert rank_shares(np.array([7.0, 3.0, 7.0, 100.0])).tolist() == [0.5, 0.125, 0.5, 0.875]


def test_built_in_pairs_are_what_they_say() -> None:
    pairs = read_pairs()
    assert len(pairs) == 60 and len({frozenset((p.first, p.second)) for p in pairs}) == 60
    assert all(word_overlap(p.first, p.second) <= 0.15 for p in pairs if p.same_meaning)
    assert all(word_overlap(p.first, p.second) >= 0.5 for p in pairs if not p.same_meaning)
    assert {p.kind for p in pairs} == {"swap", "relation", "attribute", "negation", "number", "paraphrase"}


def test_an_encoder_of_words_alone_is_found_out() -> None:
    """Its similarity rises with overlap without exception and never tells a meaning from the other."""
    pairs = read_pairs()
    feature_ND = bag_of_words([s for p in pairs for s in (p.first, p.second)])
    similarity = (feature_ND[::2] * feature_ND[1::2]).sum(axis=1).astype(float)
    overlap = np.array([word_overlap(p.first, p.second) for p in pairs])
    meaning = np.array([float(p.same_meaning) for p in pairs])
    result = analyse(Measured(pairs, overlap, similarity, meaning), 100, 0, circular=False)
    assert result["spearman"]["a_overlap"] > 0.95 > 0 > result["spearman"]["b_overlap"]
    assert (result["auc"]["a"]["value"], result["auc"]["b"]["value"], result["auc"]["overlap"]["value"]) == (0, 1, 0)
    assert {row["auc_b"] for row in result["kinds"]} == {1.0}
    assert sum(row["n"] for row in result["kinds"]) == 60


def test_exchanged_sentences_tell_an_encoder_of_noise_from_one_of_meaning() -> None:
    order, other = exchange(np.array([3, 5, 8, 9]), seed=0)
    assert sorted(order.tolist()) == sorted(other.tolist()) == [3, 5, 8, 9] and (order != other).all()
    assert len(exchange(np.array([3]), seed=0)[0]) == 0
    pairs = read_pairs()
    place = {sentence: number for number, pair in enumerate(pairs) for sentence in (pair.first, pair.second)}
    meaning = TextSide("m", lambda s: np.eye(60, dtype=np.float32)[[place[x] for x in s]], "")  # one direction a pair
    rng = np.random.default_rng(0)
    noise = TextSide("n", lambda s: rng.standard_normal((len(s), 60)).astype(np.float32), "")
    result = analyse(measure(pairs, meaning, noise, seed=0), 100, 0, circular=False)
    found = result["auc_exchanged"]
    assert found["a"]["value"] == 1.0 and 0.25 < found["b"]["value"] < 0.75
    assert found["overlap"]["value"] < 0.7  # words hardly help


def test_close_pairs_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    sets = [frozenset(f"w{int(i)}" for i in rng.zipf(1.5, rng.integers(1, 9)) % 40) for _ in range(300)]
    images = rng.integers(0, 60, 300)
    for least in (0.5, 0.6, 1.0):
        expected = [(i, j) for i, j in combinations(range(300), 2) if len(sets[i] & sets[j]) >= least * len(sets[i] | sets[j])]
        found, count = close_in_words(sets, least, rng)
        assert [tuple(pair) for pair in found.tolist()] == expected and count == len(expected) > 100
        other, _ = close_in_words(sets, least, rng, images)
        assert [tuple(pair) for pair in other.tolist()] == [(i, j) for i, j in expected if images[i] != images[j]]


def test_more_close_pairs_than_fit_are_counted_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.text.mining.POOL", 50)
    monkeypatch.setattr("eval.text.mining.BLOCK", 16)
    found, count = close_in_words([frozenset("ab")] * 60, 0.9, np.random.default_rng(0))
    assert len({tuple(pair) for pair in found.tolist()}) == 50 and count == 60 * 59 // 2
    assert found[:, 0].max() > 30  # from all blocks, not the first


def test_images_give_the_meaning_and_the_encoders_have_no_part() -> None:
    captions = [
        Caption("a dog chases a cat", "1"),
        Caption("one puppy runs after some kitten", "1"),
        Caption("a cat chases a dog", "2"),
        Caption("A dog chases a cat", "1"),  # the same again
    ]

    def refuses(sentences: list[str]) -> np.ndarray:
        raise AssertionError(sentences)

    mined = mine(captions, LIMITS, [refuses])
    assert {(p.first, p.second, p.same_meaning, p.kind) for p in mined.pairs} == {
        ("A dog chases a cat", "a cat chases a dog", False, "different images"),
        ("A dog chases a cat", "one puppy runs after some kitten", True, "same image"),
    }
    assert mined.counts == {
        "captions": 4,
        "distinct": 3,
        "looked_at": 3,
        "meaning_from": "images",
        "close_in_words": 1,
        "far_in_words": 1,
    }


def test_without_images_the_encoders_choose_and_no_auc_is_given() -> None:
    texts = ["a dog chases a cat", "a cat chases a dog", "one puppy runs after kittens", "the shop is shut", "the shop is open"]
    meaning = np.array([[1, 0, 0], [0, 1, 0], [1, 0.1, 0], [0, 0, 1], [0, 0.3, 1]], np.float32)
    meaning /= np.linalg.norm(meaning, axis=1, keepdims=True)
    mined = mine([Caption(text, None) for text in texts], LIMITS, [lambda s: meaning[[texts.index(x) for x in s]]])
    assert (mined.pairs[0].first, mined.pairs[0].second, mined.pairs[0].same_meaning) == (texts[0], texts[1], False)
    far = [(p.first, p.second) for p in mined.pairs if p.same_meaning]
    assert far[0] == (texts[0], texts[2])
    measured = Measured(mined.pairs, *(np.arange(float(len(mined.pairs))) for _ in range(3)))
    result = analyse(measured, 100, 0, circular=True)
    assert result["auc"].startswith("not computed") and all(row["auc_a"] is None for row in result["kinds"])


def test_caps_hold_and_the_seed_repeats() -> None:
    rng = np.random.default_rng(3)
    captions = [Caption(" ".join(rng.choice(list("abcdefgh"), 5)) + f" {i % 3}", str(i // 4)) for i in range(400)]
    limits = Limits(0.6, 0.2, max_pairs=20, max_captions=100, seed=5)
    mined = mine(captions, limits, [])
    assert mined.counts["looked_at"] == 100 and mined.counts["close_in_words"] > 20
    assert sum(not p.same_meaning for p in mined.pairs) == 20
    assert mined.pairs == mine(captions, limits, []).pairs
    assert mined.pairs != mine(captions, Limits(0.6, 0.2, 20, 100, seed=6), []).pairs


def test_command_on_real_encoders(encoders: tuple[Path, Path], tiny_llm: Path, tmp_path: Path, capsys) -> None:
    """LIFT's and CLIP's text side, and LIFT's again as the frozen encoder itself, from the command line to the page."""
    lift, clip = map(str, encoders)
    rows = [
        {"first": ATTACK, "second": "</script><img src=x onerror=alert(1)>", "same_meaning": True, "kind": "<b>bold</b>"},
        {"first": "a dog chases a cat", "second": "a cat chases a dog", "same_meaning": False},
        {"first": "=1+1", "second": 'snow, "white"', "same_meaning": True},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert main(["text", lift, clip, "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(out), "--resamples", "100"]) == 0
    result = json.loads((out / "text.json").read_text())
    sides = [open_text_encoder(name) for name in (lift, clip)]
    assert [result["encoders"][s]["hash"] for s in "ab"] == [side.content_hash for side in sides]
    assert [side.label for side in sides] == ["contrastive", "clip"]
    with (out / "pairs.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["first"], row["second"]) for row in written] == [(row["first"], row["second"]) for row in rows]
    for name, side in zip("ab", sides, strict=True):
        for row in written:
            first, second = side.encode([row["first"], row["second"]])
            assert float(row[f"similarity_{name}"]) == pytest.approx(float(first @ second), abs=1e-4)
    assert float(written[1]["overlap"]) == 1.0
    page = (out / "scatter.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "<b>bold" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; a dog" in page
    assert "<script src=" not in page and page.count("Plotly.newPlot(") >= 3
    assert "A = contrastive, B = clip" in capsys.readouterr().out
    assert main(["text", str(tiny_llm), clip, "--out", str(tmp_path / "second"), "--resamples", "100"]) == 0
    second = json.loads((tmp_path / "second" / "text.json").read_text())
    assert 0 <= second["auc_exchanged"]["a"]["value"] <= 1 and second["auc_exchanged"]["overlap"]["n_different"] == 30
    assert second["source"]["name"] == "built-in pairs" and second["pairs"]["n"] == 60


def test_frozen_text_encoder_is_normalised(tiny_llm: Path) -> None:
    side = open_text_encoder(str(tiny_llm))
    np.testing.assert_allclose(np.linalg.norm(side.encode(["a", "a longer one"]), axis=1), 1, atol=1e-5)


def test_encoder_without_text_side_and_what_is_no_encoder(
    encoders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lift, clip = encoders
    config = json.loads((lift / "lift_config.json").read_text())
    config["text"] |= {"path": None, "revision": None}
    (lift / "lift_config.json").write_text(json.dumps(config))
    assert main(["text", str(clip), str(lift), "--out", str(tmp_path / "o")]) == 2
    assert "imported without its text encoder" in capsys.readouterr().err
    (clip / "text_tower" / "tokenizer.json").unlink()
    assert main(["text", str(clip), str(lift), "--out", str(tmp_path / "o")]) == 2
    assert "imported without a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_text_encoder("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        open_text_encoder(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "form", "content", "message"),
    [
        ("c.txt", "lines", "", "at least two captions to make pairs of, found 0"),
        ("c.txt", "lines", "only one\n\n...\n", "at least two captions to make pairs of, found 1"),
        ("c.json", "coco", "{", "expected COCO captions in JSON"),
        ("c.json", "coco", "[]", "the list 'annotations'"),
        ("c.json", "coco", '{"annotations": [{"caption": "a"}]}', "annotation 1: expected caption and image_id"),
        ("c.jsonl", "jsonl", '{"caption": "a"}\nx', "c.jsonl:2: expected one JSON object a line"),
        ("c.jsonl", "jsonl", '{"caption": 3}', "row 1: expected an object with the text `caption`"),
        ("c.jsonl", "jsonl", '{"caption": "a", "image": 1}\n{"caption": "b"}', "found it in 1 of 2"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, name: str, form: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_captions(tmp_path / name, form)
    assert name in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected sentence pairs in JSON"),
        ("{}", "expected a list of sentence pairs, found a dict"),
        ("[]", "found 0 and 0"),
        ('[{"first": "a", "second": "b", "same_meaning": true}]', "found 1 and 0"),
        ('[{"first": "a", "second": "...", "same_meaning": true}]', "pair 1: second: expected a sentence with words"),
        ('[{"first": "a", "second": "b", "same_meaning": 1}]', "same_meaning: expected true or false, found 1"),
        ('[{"first": "a", "second": "b", "same_meaning": true, "kind": 2}]', "kind: expected a word"),
        ("[3]", "pair 1: first"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / "p.json")
    assert "p.json" in str(caught.value) and message in str(caught.value)


def test_captions_without_pairs_and_settings_that_do_not_fit(
    tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_text("a dog\nsnow falls\n")
    base = ["text", str(tiny_llm), str(tiny_llm), "--out", str(tmp_path / "o")]
    assert main([*base, "--captions", str(tmp_path / "c.txt")]) == 2
    assert "found 0 pairs with an overlap of at least 0.6" in capsys.readouterr().err
    assert main([*base, "--captions", "c.txt", "--pairs", "p.json"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*base, "--captions", "c.csv"]) == 2
    assert "Give --captions_format" in capsys.readouterr().err
    assert main([*base, "--high_overlap", "0.1"]) == 2
    assert "expected 0 <= low < high <= 1" in capsys.readouterr().err
    assert main(base[:3]) == 2
    assert "--out is required" in capsys.readouterr().err


def test_coco_captions_of_one_image_are_found(tmp_path: Path) -> None:
    rows = [{"image_id": 7, "id": 1, "caption": " a dog "}, {"image_id": 8, "id": 2, "caption": "a cat\n"}]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": rows}))
    assert read_captions(tmp_path / "c.json", "coco") == [Caption("a dog", "7"), Caption("a cat", "8")]


def test_pairs_of_the_real_coco_captions(shared: Path) -> None:
    captions = read_captions(shared / "data" / "coco" / "captions_val2017.json", "coco")
    mined = mine(captions, Limits(0.6, 0.15, 300, 100_000, 0), [])
    assert mined.counts["captions"] == 25_014 and len(mined.pairs) == 600
    for pair in mined.pairs:
        overlap = word_overlap(pair.first, pair.second)
        assert overlap <= 0.15 if pair.same_meaning else overlap >= 0.6


def test_pairs_read_back_as_written(tmp_path: Path) -> None:
    pair = Pair("a", "b", True, "paraphrase")
    (tmp_path / "p.json").write_text(json.dumps([pair.__dict__, {"first": "c", "second": "d", "same_meaning": False}]))
    assert read_pairs(tmp_path / "p.json") == [pair, Pair("c", "d", False, "different")]
