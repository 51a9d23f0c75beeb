"""Zero-shot classification: hand-worked ranks, parity with independent implementations, the official arithmetic, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colours import ColourEncoder, colour_image, write_images
from tiny import write_tar

from eval.encoder import evaluate
from eval.features import Features, normalised
from eval.measures import measured, records_table
from eval.settings import ClassificationData, EncoderSettings
from eval.tasks import load_task
from eval.tasks.class_ranking import concatenated, rank_classes
from eval.tasks.classification import (
    class_embeddings,
    official_class_embeddings,
    official_ranks,
    prompts,
    read_templates,
    zero_shot_ranks,
)
from lift.common.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes; of four images of `red` one is more blue than red, and one as red as it is green."""
    return write_images(
        tmp_path / "val",
        {
            "red/1.png": colour_image((250, 0, 0)),
            "red/2.png": colour_image((250, 50, 0)),
            "red/bluish.png": colour_image((50, 0, 250)),
            "red/yellow.png": colour_image((200, 200, 0)),
            "green/1.png": colour_image((0, 250, 0)),
            "blue/1.png": colour_image((0, 0, 250)),
        },
    )


def values(path: Path, encoder: ColourEncoder | None = None, protocol: Any = "standard", **settings: Any) -> dict[str, Any]:
    task = load_task("classification")
    data = task.read(ClassificationData(path, **settings), False)
    scored = task.score(data, Features(encoder or ColourEncoder(), protocol))
    table = records_table("classification", scored.records)
    return {measure.name: measured(table, measure) for measure in scored.measures} | {"details": scored.details, "table": table}


def test_ranks_by_hand() -> None:
    scores = np.array([[3, 1, 2], [3, 1, 2], [2, 2, 1], [2, 2, 1], [1, 1, 1], [0, np.nan, 0]], np.float32)
    ranks = rank_classes(scores, np.array([0, 1, 0, 2, 1, 1]))
    assert ranks.rank_N.tolist() == [0, 2, 1, 2, 2, 2]
    assert ranks.tie_N.tolist()[:5] == [False, False, True, False, True]
    assert ranks.predicted_N.tolist()[:5] == [0, 0, 1, 0, 0]
    assert ranks.scores_NK[1].tolist() == [1, 3, 2]


def test_measures_by_hand(images: Path) -> None:
    found = values(images)
    assert found["top1"]["value"] == pytest.approx(4 / 6) and found["top1"]["n"] == 6
    assert found["mean_per_class"]["value"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert found["top1"]["ties"] == 1
    assert "top5" not in found
    assert found["details"]["per_class"]["red"] == {"n": 4, "top1": 0.5}
    assert sorted(found["details"]["confusions"]) == [("red", "blue", 1), ("red", "green", 1)]


def test_records_name_the_image_and_keep_the_right_score_first(images: Path) -> None:
    rows = {row["id"]: row for row in values(images)["table"].to_pylist()}
    bluish = rows["red/bluish.png"]
    length = np.hypot(50, 250)
    assert bluish["subtask"] == "red" and bluish["rank"] == 1 and bluish["correct"] == 0 and not bluish["tie"]
    assert bluish["scores"] == pytest.approx([50 / length, 250 / length, 0], abs=1e-5)
    assert rows["red/yellow.png"]["tie"] and rows["red/yellow.png"]["correct"] == 0


def test_a_collapsed_encoder_gets_nothing_right(images: Path) -> None:
    found = values(images, ColourEncoder(collapsed=True))
    assert found["top1"]["value"] == 0 and found["top1"]["ties"] == 6


def test_a_class_is_the_mean_of_its_prompts(tmp_path: Path) -> None:
    """`red` and `red green` are (1, 0, 0) and (1, 1, 0) / sqrt 2; their mean is normalised again."""
    encoder = ColourEncoder()
    found = class_embeddings(Features(encoder), ["red"], ["a {}", "a {} green"])
    expected = np.array([1 + np.sqrt(0.5), np.sqrt(0.5), 0])
    assert found[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    assert [text for text in encoder.seen if text != "images"] == ["a red green", "a red"]


def test_parity_with_numpy_on_random_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.tasks.classification.IMAGES_AT_A_TIME", 37)
    generator = np.random.default_rng(0)
    image_ND = normalised(generator.standard_normal((300, 8)).astype(np.float32))
    class_CD = normalised(generator.standard_normal((40, 8)).astype(np.float32))
    label_N = generator.integers(0, 40, 300)
    ranks = concatenated(zero_shot_ranks(image_ND, class_CD, label_N))
    order_NC = np.argsort(-(image_ND.astype(np.float64) @ class_CD.astype(np.float64).T), axis=1)
    assert np.array_equal(ranks.rank_N, [list(order).index(label) for order, label in zip(order_NC, label_N, strict=True)])
    assert np.array_equal(ranks.predicted_N, order_NC[:, 0])
    assert 0 < np.mean(ranks.rank_N < 5) < 0.5


def test_parity_with_open_clip_class_embeddings() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision, text).eval()
    tokenizer = open_clip.SimpleTokenizer()

    class TinyClip(ColourEncoder):
        embedding_dim = 24

        def text_embeddings(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
            with torch.no_grad():
                return model.encode_text(tokenizer(list(texts))).numpy()

    names, templates = ["tench", "great white shark", "crane"], read_templates("openai")
    assert templates == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES).T.numpy()
    found = class_embeddings(Features(TinyClip()), names, templates)
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_tars_and_folders_of_the_same_images_give_the_same_numbers(images: Path, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        members |= {f"{number}.png": path.read_bytes(), f"{number}.cls": path.parent.name.encode()}
    by_folder, by_tar = values(images), values(write_tar(tmp_path / "val.tar", members))
    assert by_folder["details"] == by_tar["details"]
    assert by_folder["table"].drop_columns(["id", "cluster"]) == by_tar["table"].drop_columns(["id", "cluster"])


def test_the_official_protocol_forces_its_prompt_and_number_format(images: Path) -> None:
    frozen = ColourEncoder(has_frozen_text=True)
    found = values(images, frozen, "official", templates="openai")
    assert sorted(text for text in frozen.seen if text != "images") == [
        f"It is a photo of a {name}" for name in ("blue", "green", "red")
    ]
    assert found["details"]["templates"] == ["It is a photo of a {}"]
    assert official_class_embeddings(Features(frozen, "official"), ["red"]).dtype == torch.float16
    assert official_class_embeddings(Features(ColourEncoder(), "official"), ["red"]).dtype == torch.float32
    # classes are blue, green, red: topk settles the tie of the yellow image one way or the other, and says so
    assert found["top1"]["value"] in (4 / 6, 5 / 6) and found["top1"]["ties"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_official_ranks_are_the_scripts(dtype: torch.dtype) -> None:
    """Features close together, so that float16 makes ties within the first five."""
    generator = np.random.default_rng(1)
    image_ND = normalised((1 + 0.02 * generator.standard_normal((200, 16))).astype(np.float32))
    text_CD = torch.from_numpy((1 + 0.02 * generator.standard_normal((50, 16))).astype(np.float32)).to(dtype)
    text_CD = text_CD / text_CD.norm(dim=-1, keepdim=True)
    label_N = generator.integers(0, 50, 200)
    ranks = concatenated(official_ranks(image_ND, text_CD, label_N))
    image = torch.from_numpy(image_ND)
    image = (image / image.norm(dim=-1, keepdim=True)).to(dtype)
    similarity = (100.0 * image @ text_CD.T).softmax(dim=-1)
    for k in (1, 5):
        best = similarity.topk(k, dim=-1).indices
        right = [label in row for label, row in zip(label_N.tolist(), best.tolist(), strict=True)]
        assert (ranks.rank_N < k).tolist() == right
    top = similarity.sort(dim=-1, descending=True).values
    assert bool((top[:, 0] == top[:, 1]).any()) == (dtype == torch.float16)


def test_classes_of_one_name(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"red": "red", "green": "blue", "blue": "blue"}))
    with pytest.raises(UserError, match=r"--classification.classes: two classes have one name .*: 'blue'"):
        values(images, classes=file)
    found = values(images, classes=file, same_names=True)
    assert set(found["details"]["per_class"]) == {"red", "blue (blue)", "blue (green)"}
    assert found["details"]["per_class"]["blue (blue)"]["top1"] == 0
    assert values(images, None, "official", classes=file)["details"]["same_names"] == ["blue"]


def test_underscores_are_spaces_in_prompts_and_braces_stay() -> None:
    expected = ["a great dane", "great dane and great dane", "a {x}", "{x} and {x}"]
    assert prompts(["great_dane", "{x}"], ["a {}", "{} and {}"]) == expected


def test_templates(tmp_path: Path) -> None:
    openai = read_templates("openai")
    assert len(openai) == len(set(openai)) == 80 and all(line.count("{}") == 1 for line in openai)
    assert read_templates("official") == ["It is a photo of a {}"]
    file = tmp_path / "t.txt"
    file.write_text("a {}\n\n the {} here \n")
    assert read_templates(str(file)) == ["a {}", "the {} here"]
    for content, message in (("a {}\nno place\n", r"t\.txt, line 2: expected \{\}"), ("\n", "found no text")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_templates(str(file))
    with pytest.raises(UserError, match="official"):
        read_templates("opneai")


def test_classes_that_no_prompt_can_name(tmp_path: Path) -> None:
    wordnet = write_images(tmp_path / "w", {f"n0000000{i}/1.png": colour_image((i, 0, 0)) for i in range(2)})
    with pytest.raises(UserError, match=r"found 'n00000000' and the like. Give --imagenet.classes"):
        load_task("imagenet").read(ClassificationData(wordnet), False)
    with pytest.raises(UserError, match="expected at least two classes"):
        load_task("imagenet").read(
            ClassificationData(write_images(tmp_path / "o", {"a/1.png": colour_image((1, 0, 0))})), False
        )
    with pytest.raises(UserError, match=r"--imagenet\.path is required"):
        load_task("imagenet").read(ClassificationData(), False)


def test_six_classes_have_a_top5(tmp_path: Path) -> None:
    colours = {name: (40 * i, 100, 250 - 40 * i) for i, name in enumerate("abcdef")}
    folder = write_images(tmp_path / "six", {f"{name}/1.png": colour_image(rgb) for name, rgb in colours.items()})
    names = ["red", "green", "blue", "red green", "red blue", "green blue"]
    (tmp_path / "c.json").write_text(json.dumps(names))
    found = values(folder, classes=tmp_path / "c.json", templates="official")
    # image, then nearness: cosine with the class vectors, worked out here from the colours
    class_CD = normalised(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float64))
    similarity = normalised(np.array(list(colours.values()), np.float64)) @ class_CD.T
    rank = [int(np.sum(row > row[i])) for i, row in enumerate(similarity)]
    assert found["top1"]["value"] == pytest.approx(np.mean(np.array(rank) == 0))
    assert found["top5"]["value"] == pytest.approx(np.mean(np.array(rank) < 5)) and 0 < found["top5"]["value"] < 1


def test_the_command_writes_results_and_records(images: Path, tmp_path: Path) -> None:
    settings = EncoderSettings("colours", "classification", classification=ClassificationData(images))
    task = load_task("classification")
    data = {"classification": task.read(settings.classification, False)}
    results = evaluate(ColourEncoder(), settings, {"classification": task}, data, tmp_path / "out")  # type: ignore[arg-type]
    assert results["metrics"]["classification/top1"]["value"] == pytest.approx(4 / 6)
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["tasks"]["classification"]["details"]["per_class"]["green"] == {"n": 1, "top1": 1.0}
    assert written["tasks"]["classification"]["notes"]["prompts_per_class"] == 80
    assert pq.read_table(tmp_path / "out/records.parquet").num_rows == 6
