"""Encoder metrics on cases worked by hand, and the whole command on an encoder made of a table."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.encoder import evaluate
from eval.metrics import hard_negative_accuracy, recall_at, retrieval_ranks
from eval.settings import EncoderSettings
from lift.common.errors import UserError
from lift.common.files import read_json, read_jsonl


def test_hard_negatives_count_a_tie_as_half() -> None:
    metric = hard_negative_accuracy(np.array([0.9, 0.2, 0.5, 0.4], np.float32), np.array([0.1, 0.3, 0.5, 0.3], np.float32))
    assert (metric.value, metric.n, metric.ties) == (2.5 / 4, 4, 1)
    # Wilson with z = 1.959964: ((0.625 + 0.4802) ± 1.959964 · sqrt(0.234375 / 4 + 3.8415 / 64)) / 1.9604
    assert metric.interval == pytest.approx((0.2194, 0.9081), abs=1e-4)


def test_hard_negatives_refuse_features_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        hard_negative_accuracy(np.array([np.nan], np.float32), np.array([0.0], np.float32))


def test_ranks_count_same_label_as_correct_and_ties_against_the_encoder() -> None:
    gallery = np.eye(3, dtype=np.float32)
    query = np.array([[1, 0, 0], [0.8, 0.6, 0], [0.6, 0.6, 0]], np.float32)
    ranks, ties = retrieval_ranks(query, gallery, np.array([0, 1, 0]), np.array([0, 1, 2]))
    assert ranks.tolist() == [0, 1, 1]  # the third query is as near to a wrong item as to its own
    assert ties.tolist() == [False, False, True]
    ranks, ties = retrieval_ranks(query, gallery, np.array([0, 0, 0]), np.array([0, 0, 1]))
    assert ranks.tolist() == [0, 0, 0] and not ties.any()
    assert recall_at(np.array([0, 1, 5]), np.array([False, True, False]), 5).value == pytest.approx(2 / 3)


def test_collapsed_encoder_does_not_score() -> None:
    same = np.ones((20, 4), np.float32)
    ranks, ties = retrieval_ranks(same, same, np.arange(20), np.arange(20))
    assert recall_at(ranks, ties, 10).value == 0.0 and ties.all()


class ColourEncoder:
    """Image -> its mean colour, caption -> the colour it names; counts what it is asked to encode."""

    content_hash = "colour"
    _COLOURS = ("red", "green", "blue")

    def __init__(self) -> None:
        self.images = 0
        self.captions: list[str] = []

    def encode_images(self, images: list[Image.Image], batch_size: int = 64) -> np.ndarray:
        self.images += len(images)
        assert all(image.mode == "RGB" for image in images)
        return _normalised(np.array([np.asarray(image, np.float32).mean(axis=(0, 1)) + 1e-3 for image in images], np.float32))

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        self.captions += texts
        return _normalised(np.array([[float(colour in text) + 1e-3 for colour in self._COLOURS] for text in texts], np.float32))


def _normalised(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _image(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("P" if colour == "green" else "RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for colour in ("red", "green"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(_image(colour))
    items = {
        "0": {"filename": "red.png", "caption": "a red field", "negative_caption": "a blue field"},
        "1": {"filename": "green.png", "caption": "a green field", "negative_caption": "a red field"},
        "2": {"filename": "red.png", "caption": "a field", "negative_caption": "a wide field"},
    }
    (tmp_path / "swap_att.json").write_text(json.dumps(items))
    (tmp_path / "pairs").mkdir()
    with tarfile.open(tmp_path / "pairs" / "00000.tar", "w") as tar:
        for key, colour, caption in (("0", "red", "red"), ("1", "green", "green"), ("2", "red", "red"), ("3", "blue", "green")):
            for name, content in ((f"{key}.png", _image(colour)), (f"{key}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tmp_path


def _settings(data: Path, **changes: object) -> EncoderSettings:
    values = {"sugar_crepe": data, "images": data / "images", "out": data / "out", "retrieval": data / "pairs"} | changes
    return EncoderSettings(data, **values)  # type: ignore[arg-type]


def test_encoder_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = ColourEncoder()
    results = evaluate(encoder, _settings(data))
    metrics = results["metrics"]
    assert (metrics["sugar_crepe/swap_att"]["value"], metrics["sugar_crepe/swap_att"]["ties"]) == (2.5 / 3, 1)
    assert metrics["retrieval/image_to_text_r1"]["value"] == 0.75  # the blue image's caption says green
    assert metrics["retrieval/text_to_image_r1"]["value"] == 1.0  # either green caption finds the green image
    assert encoder.images == 2 + 4 and len(encoder.captions) == 5 + 2  # each distinct one once
    assert read_json(data / "out" / "results.json") == results
    records = read_jsonl(data / "out" / "records.jsonl")
    assert [row["correct"] for row in records[:3]] == [1.0, 1.0, 0.5] and len(records) == 3 + 8
    assert "83.33" in capsys.readouterr().out
    assert evaluate(encoder, _settings(data))["data_hash"] == results["data_hash"]


def test_missing_image_is_named_or_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "images" / "green.png").unlink()
    with pytest.raises(UserError, match=r"green\.png.*swap_att\.json item 1"):
        evaluate(ColourEncoder(), _settings(data))
    assert not (data / "out").exists()
    results = evaluate(ColourEncoder(), _settings(data, allow_missing=True))
    assert results["missing_images"] == ["swap_att/1"] and results["metrics"]["sugar_crepe/swap_att"]["n"] == 2
    assert "1 items left out" in capsys.readouterr().out


def test_faulty_items_are_named(data: Path) -> None:
    (data / "images" / "red.png").write_bytes(_image("red")[:30])
    with pytest.raises(UserError, match=r"red\.png.*cannot be decoded"):
        evaluate(ColourEncoder(), _settings(data))
    (data / "swap_att.json").write_text("{}")
    with pytest.raises(UserError, match="non-empty object"):
        evaluate(ColourEncoder(), _settings(data))
    (data / "swap_att.json").unlink()
    with pytest.raises(UserError, match=r"replace_obj\.json"):
        evaluate(ColourEncoder(), _settings(data))


def test_real_sugar_crepe_items_are_read() -> None:
    from eval.encoder_data import read_hard_negatives

    folder = Path(__file__).parents[2].parent / "shared" / "data" / "coco_sugar_crepe"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    found = read_hard_negatives(folder, folder / "val2017", allow_missing=False)
    assert len(found.items) == 259 and len({item.image for item in found.items}) == 59
