"""Hard negatives: every format read from files as published, every score worked out by hand on colours."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from toy_encoder import ToyEncoder, solid

from eval.encoder import RECORDS_FILE, chosen_tasks, evaluate
from eval.features import Features
from eval.images import image_item
from eval.measures import measured, records_table
from eval.settings import EncoderSettings, HardNegativeData
from eval.tasks import Scored, TaskData, load_task
from eval.tasks import hard_negative_files as files
from eval.tasks.hard_negatives import Contest, outcome
from eval.tasks.word_order import perturbed, spacy_tagger, words_of
from lift.common.errors import UserError

RIGHT, WRONG, TIE = ("red", "green"), ("green", "red"), ("a red", "the red")
"""Captions of a red image, the right one first."""


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def read(task: str, path: Path, allow_missing: bool = False, images: Path | None = None) -> TaskData:
    return load_task(task).read(HardNegativeData(path, images), allow_missing)


def score(task: str, data: TaskData, protocol: Any = "standard", encoder: ToyEncoder | None = None) -> Scored:
    return load_task(task).score(data, Features(encoder or ToyEncoder(), protocol))  # type: ignore[arg-type]


def values(scored: Scored) -> dict[str, float]:
    table = records_table("task", scored.records)
    return {measure.name: measured(table, measure)["value"] for measure in scored.measures}


def ties(scored: Scored) -> dict[str, int]:
    table = records_table("task", scored.records)
    return {measure.name: measured(table, measure)["ties"] for measure in scored.measures}


# SugarCrepe


def sugarcrepe(folder: Path, subtasks: dict[str, list[tuple[str, str]]], image: str = "red.png") -> Path:
    for subtask, captions in subtasks.items():
        entries = {
            str(number): {"filename": image, "caption": right, "negative_caption": wrong}
            for number, (right, wrong) in enumerate(captions)
        }
        write(folder / f"{subtask}.json", entries)
    solid(folder / "images/red.png", "red")
    return folder


def test_sugarcrepe_means_over_subtasks_kinds_and_items(tmp_path: Path) -> None:
    folder = sugarcrepe(
        tmp_path,
        {
            "replace_obj": [RIGHT, WRONG],
            "replace_att": [RIGHT],
            "replace_rel": [WRONG],
            "swap_obj": [TIE],
            "swap_att": [RIGHT, RIGHT, RIGHT, WRONG],
            "add_obj": [RIGHT, TIE],
            "add_att": [WRONG],
        },
    )
    scored = score("sugarcrepe", read("sugarcrepe", folder))
    assert values(scored) == pytest.approx(
        {
            "replace_obj": 0.5,
            "replace_att": 1.0,
            "replace_rel": 0.0,
            "swap_obj": 0.5,
            "swap_att": 0.75,
            "add_obj": 0.75,
            "add_att": 0.0,
            "replace": 0.5,
            "swap": 0.625,
            "add": 0.375,
            "average": 0.5,
            "all": 7 / 12,
        }
    )
    assert ties(scored)["all"] == 2 and ties(scored)["add_obj"] == 1


def test_sugarcrepe_of_some_files_has_the_measures_of_those(tmp_path: Path) -> None:
    scored = score("sugarcrepe", read("sugarcrepe", sugarcrepe(tmp_path, {"add_obj": [RIGHT], "swap_obj": [WRONG]})))
    assert values(scored) == {"add_obj": 1.0, "swap_obj": 0.0, "average": 0.5, "all": 0.5}


def test_missing_images_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    folder = sugarcrepe(tmp_path, {"swap_obj": [RIGHT]})
    sugarcrepe(tmp_path, {"swap_att": [RIGHT, RIGHT]}, image="gone.png")
    with pytest.raises(UserError, match=r"gone\.png.*swap_att/0.*--sugarcrepe\.images.*--allow_missing"):
        read("sugarcrepe", folder)
    data = read("sugarcrepe", folder, allow_missing=True)
    assert data.missing == ["swap_att/0", "swap_att/1"] and len(data.items) == 1
    (folder / "swap_obj.json").unlink()
    with pytest.raises(UserError, match="2 items have no image"):
        read("sugarcrepe", folder, allow_missing=True)


def test_data_hash_is_of_captions_and_image_content(tmp_path: Path) -> None:
    def hashed() -> str:
        return read("sugarcrepe", tmp_path).data_hash

    sugarcrepe(tmp_path, {"swap_obj": [RIGHT, WRONG]})
    first = hashed()
    assert hashed() == first
    solid(tmp_path / "images/red.png", "green")
    other_image = hashed()
    sugarcrepe(tmp_path, {"swap_obj": [RIGHT, TIE]})
    assert len({first, other_image, hashed()}) == 3


def test_official_protocol_compares_unnormalised_half_precision_texts(tmp_path: Path) -> None:
    longer = ("red", "red red green green green")  # normalised 1 to 0.55, not normalised 1 to 2
    rounded = ("red " * 2049, "red " * 2048)  # float16 knows no 2049
    data = read("sugarcrepe", sugarcrepe(tmp_path, {"swap_obj": [longer, rounded, RIGHT]}))
    frozen = ToyEncoder(has_frozen_text=True)
    official = score("sugarcrepe", data, "official", frozen).records
    assert [record.correct for record in official] == [0.0, 0.0, 1.0]
    assert list(official[0].scores) == [1.0, 2.0] and list(official[1].scores) == [2048.0, 2048.0]
    assert [record.tie for record in official] == [False, True, False]
    standard = score("sugarcrepe", data, "standard", frozen).records
    assert [record.correct for record in standard] == [1.0, 0.5, 1.0]
    assert standard[0].scores == pytest.approx([1.0, 2 / np.sqrt(13)])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_image_that_is_not_rgb_is_wrong_for_the_official_script_only(tmp_path: Path, mode: str) -> None:
    data_folder = sugarcrepe(tmp_path, {"swap_obj": [("red green blue", "green")]}, image="odd.png")
    solid(data_folder / "images/odd.png", (128, 128, 128), mode)
    data = read("sugarcrepe", data_folder)
    assert [record.correct for record in score("sugarcrepe", data, "official").records] == [0.0]
    assert [record.correct for record in score("sugarcrepe", data).records] == [1.0]


def test_official_protocol_counts_a_tie_as_wrong(tmp_path: Path) -> None:
    scored = score("sugarcrepe", read("sugarcrepe", sugarcrepe(tmp_path, {"swap_obj": [TIE, RIGHT]})), "official")
    assert values(scored)["swap_obj"] == 0.5 and ties(scored)["swap_obj"] == 1


@pytest.mark.parametrize(
    ("scores", "shares", "expected"),
    [
        ([0.9, 0.1, 0.2], True, (1.0, False)),
        ([0.9, 0.9, 0.2], True, (1 / 2, True)),
        ([0.9, 0.9, 0.9], True, (1 / 3, True)),
        ([0.5, 0.5, 0.9], True, (0.0, False)),
        ([0.9, 0.9, 0.2], False, (0.0, True)),
    ],
)
def test_a_tie_for_the_first_place_is_shared(scores: list[float], shares: bool, expected: tuple[float, bool]) -> None:
    contest = Contest("s", "0", (("a", "b"),) * 3, ((0, 1), (0, 2)), "c", shares_ties=shares)
    assert outcome(contest, np.array(scores, np.float32)) == pytest.approx(expected)


def test_real_sugarcrepe_is_read_whole(shared: Path) -> None:
    photos = shared / "data/coco_sugar_crepe/val2017"
    whole = read("sugarcrepe", shared / "data/sugar_crepe", allow_missing=True, images=photos)
    assert len(whole.items) + len(whole.missing) == 7511
    part = read("sugarcrepe", shared / "data/coco_sugar_crepe", images=photos)
    assert len(part.items) == 259 == len(whole.items) and not part.missing
    scored = score("sugarcrepe", part)
    by_hand = np.mean([record.scores[0] > record.scores[1] for record in scored.records if not record.tie] or [0])
    shared_ties = sum(record.tie for record in scored.records)
    strict = values(scored)["all"] * 259 - shared_ties / 2
    assert strict == pytest.approx(by_hand * (259 - shared_ties))


# SugarCrepe++


def plus_entry(number: int, first: str, second: str, negative: str) -> dict[str, Any]:
    return {"id": number, "filename": "red.png", "caption": first, "caption2": second, "negative_caption": negative}


def test_sugarcrepe_pp_scores_image_to_text_and_text_only(tmp_path: Path) -> None:
    solid(tmp_path / "images/red.png", "red")
    write(
        tmp_path / "swap_object.json",
        [
            plus_entry(0, "red", "red red", "green"),  # both right
            plus_entry(1, "red", "green blue", "red blue"),  # to the image 1, 0, 0.71; P1-P2 0, P1-N 0.71
            plus_entry(2, "red green", "red blue", "green blue"),  # to the image 0.71, 0.71, 0; texts all 0.5
            plus_entry(3, "red", "a red", "the red"),  # all 1
        ],
    )
    write(tmp_path / "replace_att.json", [plus_entry(0, "red", "red green", "blue")])
    data = read("sugarcrepe_pp", tmp_path)
    scored = score("sugarcrepe_pp", data)
    assert values(scored) == pytest.approx(
        {
            "swap_obj/itt": 0.5,
            "replace_att/itt": 1.0,
            "average/itt": 0.75,
            "all/itt": 0.6,
            "swap_obj/tot": 0.25,
            "replace_att/tot": 1.0,
            "average/tot": 0.625,
            "all/tot": 0.4,
        }
    )
    assert ties(scored)["swap_obj/itt"] == 1 and ties(scored)["swap_obj/tot"] == 2
    record = next(record for record in scored.records if (record.subtask, record.id) == ("swap_obj/tot", "1"))
    assert record.scores == pytest.approx([0.0, np.sqrt(0.5), 0.5]) and record.cluster.endswith("red.png")
    assert values(score("sugarcrepe_pp", data, "official", ToyEncoder(has_frozen_text=True))) == values(scored)


# ARO


def visual_genome(number: int, captions: tuple[str, str], image: str = "red.png", **more: Any) -> dict[str, Any]:
    box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 8, "bbox_h": 6}
    return (
        {"image_id": str(number), "image_path": image, "true_caption": captions[0], "false_caption": captions[1]} | box | more
    )


def test_aro_relation_counts_the_published_relations(tmp_path: Path) -> None:
    solid(tmp_path / "images/red.png", "red")
    relations = [("riding", RIGHT), ("riding", WRONG), ("on", RIGHT), ("near", WRONG)]
    entries = [visual_genome(i, captions, relation_name=name) for i, (name, captions) in enumerate(relations)]
    scored = score("aro_relation", read("aro_relation", write(tmp_path / "visual_genome_relation.json", entries)))
    assert values(scored) == {"macro": 0.75, "all": 0.5}
    assert scored.details["subtasks"] == {
        "near": {"accuracy": 0.0, "n": 1, "in macro": False},
        "on": {"accuracy": 1.0, "n": 1, "in macro": True},
        "riding": {"accuracy": 0.5, "n": 2, "in macro": True},
    }
    assert len(files.relations_left_out()) == 157


def test_aro_attribution_counts_pairs_of_25_items_and_more(tmp_path: Path) -> None:
    solid(tmp_path / "images/red.png", "red")
    often = [visual_genome(i, RIGHT if i < 20 else WRONG, attributes=["red", "blue"]) for i in range(25)]
    seldom = [visual_genome(i, WRONG, attributes=["big", "small"]) for i in range(3)]
    write(tmp_path / "visual_genome_attribution.json", often + seldom)
    scored = score("aro_attribution", read("aro_attribution", tmp_path))
    assert values(scored) == pytest.approx({"macro": 0.8, "all": 20 / 28})
    assert scored.details["subtasks"]["big_small"] == {"accuracy": 0.0, "n": 3, "in macro": False}


def two_halves(path: Path) -> None:
    """Left half red, right half blue, 8 x 6 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 6), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 4, 6))
    image.save(path)


def test_aro_shows_the_encoder_the_box(tmp_path: Path) -> None:
    two_halves(tmp_path / "images/two.png")
    left = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 4, "bbox_h": 6}
    right = {"bbox_x": 4, "bbox_y": 0, "bbox_w": 6, "bbox_h": 6}  # two columns beyond the edge
    entries = [
        visual_genome(0, ("red", "blue"), "two.png", relation_name="on", **left),
        visual_genome(1, ("blue", "red"), "two.png", relation_name="on", **right),
        visual_genome(2, ("red", "blue"), "two.png", relation_name="on"),
    ]
    data = read("aro_relation", write(tmp_path / "visual_genome_relation.json", entries))
    assert len(data.images) == 3 and data.notes == {"boxes partly outside their image": 1}
    records = score("aro_relation", data).records
    assert [list(record.scores) for record in records] == [
        [1.0, 0.0],
        [1.0, 0.0],
        pytest.approx([np.sqrt(0.5)] * 2),
    ]
    assert [record.correct for record in records] == [1.0, 1.0, 0.5] and records[2].tie


@pytest.mark.parametrize("box", [(8, 0, 4, 6), (-5, 0, 8, 6), (0, 0, 0, 6), (0, 0, 80, 60)])
def test_box_outside_the_image_is_refused(tmp_path: Path, box: tuple[int, ...]) -> None:
    two_halves(tmp_path / "images/two.png")
    where = dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), box, strict=True))
    file = write(tmp_path / "visual_genome_relation.json", [visual_genome(0, RIGHT, "two.png", relation_name="on", **where)])
    with pytest.raises(UserError, match=r"on/0.*two\.png.*inside an image of 8 x 6 pixels, found \["):
        read("aro_relation", file)
    left, upper, width, height = box
    with pytest.raises(UserError, match="inside an image"):
        image_item(tmp_path / "images/two.png", (left, upper, left + width, upper + height)).load()


def test_order_of_published_options_and_their_ties(tmp_path: Path) -> None:
    solid(tmp_path / "images/red.png", "red")
    entries = [
        {"image": "red.png", "caption_options": ["red", "green", "blue", "red blue", "red green"]},
        {"image": "red.png", "caption_options": ["red blue", "green", "blue", "red", "red green"]},
        {"image": "red.png", "caption_options": ["a red", "the red", "blue", "red blue", "red green"]},
    ]
    data = read("aro_coco_order", write(tmp_path / "coco_karpathy_test.json", entries))
    assert values(score("aro_coco_order", data)) == {"accuracy": 0.5}
    # ARO takes the first of equal candidates, and the true caption is the first
    assert values(score("aro_coco_order", data, "official")) == pytest.approx({"accuracy": 2 / 3})


TAGS = {"dog": "NN", "cat": "NN", "big": "JJ", "old": "JJ"}


def tagger(words: Any) -> list[str]:
    return [TAGS.get(word, "XX") for word in words]


def test_order_of_captions_is_perturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "spacy_tagger", lambda where: tagger)  # the model is no part of the environment
    solid(tmp_path / "flickr30k-images/7.png", "red")
    captions = ["The dog and the cat.", "Red.", "A red cat, a red cat"]
    write(tmp_path / "flickr30k_test.json", [{"image": "flickr30k-images/7.png", "caption": captions}])
    data = read("aro_flickr_order", tmp_path, images=tmp_path)
    assert [item.id for item in data.items] == ["0-0", "0-2"]
    first, second = ([str(text) for _, text in item.pairs] for item in data.items)
    assert first[0] == "the dog and the cat" and first[1] == "the cat and the dog" and len(first) == 5
    assert second[0] == "a red cat, a red cat"
    assert all(sorted(text.split()) == sorted(first[0].split()) for text in first)
    assert data.notes["captions that a perturbation leaves as they are"]["shuffle_within_trigrams"] == 1
    # the words decide here, not their order: every candidate ties, and counts one fifth
    assert score("aro_flickr_order", data).records[0].correct == pytest.approx(1 / 5)


def test_perturbations_by_hand() -> None:
    found = perturbed("A big dog sees an old cat!", tagger)
    assert found["shuffle_nouns_and_adj"] in {
        "a old dog sees an big cat",
        "a big cat sees an old dog",
        "a old cat sees an big dog",
    }
    others = found["shuffle_allbut_nouns_and_adj"].split()
    assert [others[place] for place in (1, 2, 5, 6)] == ["big", "dog", "old", "cat"]
    rest = [others[place] for place in (0, 3, 4)]
    assert sorted(rest) == ["a", "an", "sees"] and rest != ["a", "sees", "an"]
    within = found["shuffle_within_trigrams"].split()
    assert [set(within[start : start + 3]) for start in (0, 3, 6)] == [{"a", "big", "dog"}, {"sees", "an", "old"}, {"cat"}]
    assert found["shuffle_trigrams"] != " ".join(words_of("A big dog sees an old cat!"))
    assert perturbed("one two three four five six", tagger)["shuffle_trigrams"] == "four five six one two three"
    assert perturbed("A big dog sees an old cat!", tagger) == found
    assert perturbed("red", tagger) == {}
    assert len(words_of("word " * 40)) == 30 and words_of("Two (2) dogs; a CAT.") == ["two", "2", "dogs", "a", "cat"]


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_captions_without_spacy_say_what_to_do(tmp_path: Path) -> None:
    solid(tmp_path / "images/red.png", "red")
    write(tmp_path / "coco_karpathy_test.json", [{"image": "red.png", "caption": ["red"]}])
    with pytest.raises(UserError, match=r"coco_karpathy_test\.json.*pip install spacy.*en_core_web_sm.*caption_options"):
        read("aro_coco_order", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("en_core_web_sm") is None, reason="spaCy's model is not installed")
def test_spacy_tags_words() -> None:
    assert spacy_tagger("file")(["a", "big", "dog", "sees", "cats"])[1:3] == ["JJ", "NN"]


# Winoground


def winoground(folder: Path) -> Path:
    """Hand-worked: (text, image, group) is (1, 1, 1), (tie, 0, 0), (0, 0, 0) and (1, 0, 0)."""
    colours = {"red": "red", "blue": "blue", "dim": (77, 26, 243), "bright": (128, 204, 85)}
    for name, colour in colours.items():
        solid(folder / f"images/{name}.png", colour)  # type: ignore[arg-type]
    examples = [
        ("red", "blue", "red", "blue", "Object"),
        ("red", "blue", "red", "red green", "Object"),
        ("red", "blue", "blue", "red", "Relation"),
        ("dim", "bright", "red", "green", "Relation"),
    ]
    rows = [
        {"id": i, "image_0": a, "image_1": b, "caption_0": c, "caption_1": d, "tag": "T", "collapsed_tag": tag}
        for i, (a, b, c, d, tag) in enumerate(examples)
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_winoground_text_image_and_group(tmp_path: Path) -> None:
    scored = score("winoground", read("winoground", winoground(tmp_path)))
    assert values(scored) == {"text": 0.5, "image": 0.25, "group": 0.25}
    assert ties(scored) == {"text": 1, "image": 0, "group": 0}
    assert scored.details["text"] == {
        "collapsed_tag: Object": {"accuracy": 0.5, "n": 2},
        "collapsed_tag: Relation": {"accuracy": 0.5, "n": 2},
        "tag: T": {"accuracy": 0.5, "n": 4},
    }
    assert scored.details["group"]["collapsed_tag: Relation"] == {"accuracy": 0.0, "n": 2}
    # right caption with right image, then caption 1 with image 0 and caption 0 with image 1
    assert scored.records[-1].scores == pytest.approx([0.3005, 0.7987, 0.1015, 0.5012], abs=1e-4)


def test_winoground_through_the_command(tmp_path: Path) -> None:
    folder, out = winoground(tmp_path / "data"), tmp_path / "out"
    settings = EncoderSettings(encoder="toy", tasks="winoground", winoground=HardNegativeData(folder))
    tasks = chosen_tasks(settings.tasks)
    data = {name: task.read(settings.winoground, False) for name, task in tasks.items()}
    results = evaluate(ToyEncoder(), settings, tasks, data, out)  # type: ignore[arg-type]
    assert json.loads((out / "results.json").read_text())["metrics"]["winoground/text"]["value"] == 0.5
    assert results["tasks"]["winoground"]["details"]["image"]["tag: T"]["n"] == 4
    records = pq.read_table(out / RECORDS_FILE)
    assert records.num_rows == 12 and records["tie"].to_pylist().count(True) == 1
    assert set(records["cluster"].to_pylist()) == {"0", "1", "2", "3"}


def test_winoground_example_without_one_of_its_images_is_left_out(tmp_path: Path) -> None:
    winoground(tmp_path)
    (tmp_path / "images/dim.png").unlink()
    data = read("winoground", tmp_path / "examples.jsonl", allow_missing=True)
    assert data.missing == ["3"] and len(data.items) == 9


# Faulty files


SUGAR = {"filename": "red.png", "caption": "red", "negative_caption": "green"}
RELATION = visual_genome(0, RIGHT, relation_name="on")


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("sugarcrepe", "swap_obj.json", "{", "expected a file of benchmark items in JSON"),
        ("sugarcrepe", "swap_obj.json", "[]", "expected a non-empty object or list"),
        ("sugarcrepe", "swap_obj.json", '{"0": {"filename": "red.png"}}', r"item 0: .*'caption', found 'None'"),
        ("sugarcrepe", "swap_obj.json", {"7": SUGAR | {"caption": " "}}, r"item 7: .*non-empty text under 'caption'"),
        ("sugarcrepe", "swap_obj.json", {"7": SUGAR | {"filename": "../red.png"}}, "name of an image below"),
        ("sugarcrepe", "swap_obj.json", '{"7": %s, "7": %s}' % ((json.dumps(SUGAR),) * 2), "'7' occurs twice"),
        ("sugarcrepe", "other.json", {"7": SUGAR}, r"expected at least one of replace_obj\.json"),
        ("sugarcrepe_pp", "swap_att.json", [plus_entry(4, "red", "red", "green")] * 2, "'4' occurs twice"),
        ("sugarcrepe_pp", "swap_att.json", [SUGAR], "'caption2'"),
        ("sugarcrepe_pp", "add_obj.json", [SUGAR], r"at least one of swap_obj\.json"),
        ("aro_relation", "visual_genome_relation.json", [RELATION | {"relation_name": None}], "'relation_name'"),
        ("aro_relation", "visual_genome_relation.json", [RELATION | {"bbox_w": "8"}], "number of pixels under 'bbox_w'"),
        ("aro_relation", "relation.json", [RELATION], r"visual_genome_relation\.json: expected .*no such file"),
        ("aro_attribution", "visual_genome_attribution.json", [RELATION | {"attributes": ["red"]}], "two attributes"),
        (
            "aro_coco_order",
            "coco_karpathy_test.json",
            [{"image": "red.png", "caption_options": ["red"]}],
            "at least 2 captions",
        ),
        ("aro_coco_order", "coco_karpathy_test.json", [{"image": "red.png", "caption_options": ["red", ""]}], "at place 1"),
        ("winoground", "examples.jsonl", '{"id": 0}\n{', r"examples\.jsonl:2: expected one JSON object a line"),
        ("winoground", "examples.jsonl", '{"id": 0}\n{"id": 0}', "'0' occurs twice"),
        ("winoground", "examples.jsonl", {"id": 0, "image_0": "a", "image_1": "b"}, "'caption_0'"),
    ],
)
def test_faulty_files_are_named(tmp_path: Path, task: str, name: str, content: Any, message: str) -> None:
    solid(tmp_path / "images/red.png", "red")
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read(task, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_undecodable_image_is_named(tmp_path: Path) -> None:
    folder = sugarcrepe(tmp_path, {"swap_obj": [RIGHT]})
    (folder / "images/red.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"red\.png: expected an image"):
        score("sugarcrepe", read("sugarcrepe", folder))
