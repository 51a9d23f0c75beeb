"""Captioned images in each published format: the same pairs out of all, and one clear error for each fault."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from toy_encoder import solid

from eval.settings import RetrievalData
from eval.tasks.caption_files import read_captioned_images
from lift.common.errors import UserError

CAPTIONS = {"1": ["red", "a red thing"], "2": ["green"], "3": ["blue", "so blue", "red"]}
COLOURS = {"1": "red", "2": "green", "3": "blue"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        solid(tmp_path / "images" / f"{name}.png", colour)
    return tmp_path / "images"


def _coco() -> dict[str, Any]:
    numbers = [(image, caption) for image in ("1", "2", "3") for caption in CAPTIONS[image]]
    return {
        "images": [{"id": int(name), "file_name": f"{name}.png"} for name in ("3", "1", "2")],
        "annotations": [{"id": i, "image_id": int(image), "caption": text} for i, (image, text) in enumerate(numbers)],
    }


def _karpathy() -> dict[str, Any]:
    rows = [
        {"cocoid": int(name), "filename": f"{name}.png", "split": "test", "sentences": [{"raw": text} for text in texts]}
        for name, texts in CAPTIONS.items()
    ]
    return {"images": [*rows, {"cocoid": 9, "filename": "9.png", "split": "train", "sentences": [{"raw": "x"}]}]}


def _write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def _flickr(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for name, texts in CAPTIONS.items():
            writer.writerow([json.dumps(texts), "[]", "test", f"{name}.png", name])
        writer.writerow(["['it''s']", "[]", "train", "9.png", "9"])
    return path


def read(path: Path, images: Path | None, allow_missing: bool = False, **changes: Any) -> Any:
    return read_captioned_images(RetrievalData(path=path, images=images, **changes), "coco", allow_missing)


def test_every_format_gives_the_same_pairs(tmp_path: Path, images: Path) -> None:
    files = [
        _write(tmp_path / "coco.json", _coco()),
        _write(tmp_path / "karpathy.json", _karpathy()),
        _flickr(tmp_path / "f.csv"),
    ]
    for file, form in zip(files, ("coco_captions", "karpathy", "flickr_csv"), strict=True):
        rows, missing, notes = read(file, images)
        assert {row.id: list(row.captions) for row in rows} == CAPTIONS and missing == [] and notes["format"] == form
        assert [row.id for row in rows] == ["1", "2", "3"]


def test_tars_give_all_captions(pairs: Path) -> None:
    rows, missing, _ = read(pairs, None)
    assert len(rows) == 24 and missing == []
    assert rows[0].captions == ("picture number 000000000", "a noisy picture, 0 0")


def test_missing_images_stop_or_are_counted(tmp_path: Path, images: Path) -> None:
    (images / "2.png").unlink()
    file = _write(tmp_path / "coco.json", _coco())
    with pytest.raises(UserError, match=r"2\.png: expected the image of 2, .* Check --coco\.images, or give --allow_missing"):
        read(file, images)
    rows, missing, _ = read(file, images, allow_missing=True)
    assert [row.id for row in rows] == ["1", "3"] and missing == ["2"]
    for name in ("1", "3"):
        (images / f"{name}.png").unlink()
    with pytest.raises(UserError, match="found none of 3"):
        read(file, images, allow_missing=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coco: coco["images"].append(coco["images"][0]), "image 3: occurs twice"),
        (lambda coco: coco["annotations"].append(coco["annotations"][0]), "annotation 0 occurs twice"),
        (lambda coco: coco["annotations"][0].update(caption="  "), r"image 1 \(1.png\): expected captions that are not empty"),
        (lambda coco: coco["annotations"][0].update(image_id=8), "expected the image 8 of a caption"),
        (lambda coco: coco["images"].append({"id": 4, "file_name": "1.png"}), "image 4 .*expected captions"),
        (lambda coco: coco["annotations"][0].pop("caption"), "expected images .* and annotations"),
        (lambda coco: coco.update(images={}), "expected a list of objects under 'images'"),
        (lambda coco: coco["images"][0].update(file_name="../1.png"), "expected the name of an image below"),
    ],
)
def test_faulty_coco_files_are_refused(tmp_path: Path, images: Path, change: Any, message: str) -> None:
    values = _coco()
    change(values)
    with pytest.raises(UserError, match=message):
        read(_write(tmp_path / "coco.json", values), images)


def test_other_faults(tmp_path: Path, images: Path) -> None:
    karpathy = _write(tmp_path / "karpathy.json", _karpathy())
    with pytest.raises(UserError, match="expected the split 'val', found test, train"):
        read(karpathy, images, split="val")
    with pytest.raises(UserError, match="found neither"):
        read(_write(tmp_path / "other.json", [1]), images)
    with pytest.raises(UserError, match=r"--coco\.images is required"):
        read(karpathy, None)
    with pytest.raises(UserError, match=r"--coco\.path is required"):
        read_captioned_images(RetrievalData(), "coco", False)
    (tmp_path / "f.csv").write_text("raw,split,filename\nnot a list,test,1.png\n")
    with pytest.raises(UserError, match="expected columns raw"):
        read(tmp_path / "f.csv", images)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.json", images)


def test_real_coco_captions_with_the_photos_at_hand(shared: Path) -> None:
    data = shared / "data"
    rows, missing, _ = read(data / "coco_cc" / "captions.json", data / "coco_cc")
    assert len(rows) == 87 and sum(len(row.captions) for row in rows) == 435 and missing == []
    rows, missing, _ = read(data / "coco" / "captions_val2017.json", data / "coco_sugar_crepe" / "val2017", allow_missing=True)
    assert len(rows) == 59 and len(missing) == 5000 - 59
