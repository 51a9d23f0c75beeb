"""Labelled images by folder and by tar, the classes' names by file, and what is wrong with either."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from colours import colour_image, write_images
from PIL import Image
from tiny import write_tar

from eval.tasks.class_images import read_class_file, read_class_images
from lift.common.errors import UserError

RED, GREEN, BLUE = (colour_image(colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_images(tmp_path / "val", {"b/1.png": GREEN, "b/deep/2.PNG": BLUE, "a/1.png": RED})


def classes(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    return path


def test_folders_are_classes_in_sorted_order_and_images_are_found_at_any_depth(folders: Path) -> None:
    data = read_class_images(folders, None)
    assert data.classes == data.names == ["a", "b"]
    assert data.ids == ["a/1.png", "b/1.png", "b/deep/2.PNG"]
    assert data.label_N.tolist() == [0, 1, 1]
    assert [image.read() for image in data.images] == [RED, GREEN, BLUE]
    assert data.notes == {"images": 3, "classes": 2, "classes_with_images": 2, "other_files": 0}


def test_hidden_files_are_passed_over_and_others_counted(folders: Path) -> None:
    write_images(folders, {"a/._1.png": b"x", ".DS_Store": b"x", ".cache/c.png": RED, "a/list.txt": b"x", "README": b"x"})
    data = read_class_images(folders, None)
    assert data.classes == ["a", "b"] and len(data.images) == 3
    assert data.notes["other_files"] == 2


@pytest.mark.parametrize(
    "content",
    [["apple", "bat"], {"b": "bat", "a": "apple", "z": "zebra"}, {"0": ["z", "zebra"], "1": ["b", "bat"], "2": ["a", "apple"]}],
    ids=["list", "by folder", "class index"],
)
def test_names_by_file_and_only_the_folders_classes(folders: Path, tmp_path: Path, content: object) -> None:
    data = read_class_images(folders, classes(tmp_path, content))
    assert data.names == ["apple", "bat"] and data.classes == ["a", "b"]


def test_a_list_names_numbered_folders_by_their_number(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "val", {"2/x.png": RED, "10/x.png": GREEN})
    data = read_class_images(folder, classes(tmp_path, [f"name {row}" for row in range(11)]))
    assert data.classes == ["10", "2"] and data.names == ["name 10", "name 2"]


def test_the_hash_is_of_images_labels_and_names(folders: Path, tmp_path: Path) -> None:
    found = read_class_images(folders, None).content_hash()
    assert read_class_images(folders, None).content_hash() == found
    assert read_class_images(folders, classes(tmp_path, ["x", "y"])).content_hash() != found
    (folders / "a/1.png").write_bytes(BLUE)
    assert read_class_images(folders, None).content_hash() != found


def test_titles_tell_classes_of_one_name_apart(folders: Path, tmp_path: Path) -> None:
    assert read_class_images(folders, classes(tmp_path, ["crane", "crane"])).titles() == ["crane (a)", "crane (b)"]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_tar(tmp_path / "tars/0.tar", {"x.png": RED, "x.cls": b"2\n", "x.json": b"{}", "y.cls": b"0", "y.png": GREEN})
    write_tar(tmp_path / "tars/1.tar", {"x.jpg": BLUE, "x.cls": b"2"})
    return tmp_path / "tars"


def test_tars_by_number_have_all_classes_of_the_file(tars: Path, tmp_path: Path) -> None:
    data = read_class_images(tars, classes(tmp_path, ["red", "green", "blue"]))
    assert data.names == ["red", "green", "blue"] and data.named
    assert data.ids == ["0/x", "0/y", "1/x"] and data.label_N.tolist() == [2, 0, 2]
    assert [image.read() for image in data.images] == [RED, GREEN, BLUE]
    assert data.notes["classes_with_images"] == 2 and data.notes["other_files"] == 1
    assert read_class_images(tars / "1.tar", None).ids == ["1/x"]


def test_numbers_without_a_file_are_no_names(tars: Path, tmp_path: Path) -> None:
    data = read_class_images(tars, None)
    assert data.classes == ["0", "2"] and data.label_N.tolist() == [1, 0, 1] and not data.named
    wordnet = write_images(tmp_path / "w", {"n01440764/1.png": RED, "n01443537/1.png": GREEN})
    assert not read_class_images(wordnet, None).named


def test_labels_of_tars_by_name_and_by_folder(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"1.png": RED, "1.cls": b"cherry", "2.png": BLUE, "2.cls": b"n1"})
    by_file = read_class_images(tar, classes(tmp_path, {"0": ["n1", "plum"], "1": ["n2", "cherry"]}))
    assert by_file.label_N.tolist() == [1, 0]
    alone = read_class_images(tar, None)
    assert alone.names == ["cherry", "n1"] and alone.label_N.tolist() == [0, 1] and alone.named


def test_missing_images_are_an_error_or_named(folders: Path, tmp_path: Path) -> None:
    (folders / "b/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"b/gone\.png: expected the image of b/gone\.png, but it cannot be read"):
        read_class_images(folders, None)
    data = read_class_images(folders, None, allow_missing=True)
    assert data.missing == ["b/gone.png"] and len(data.images) == 3 == len(data.label_N)
    tar = write_tar(tmp_path / "t.tar", {"1.png": RED, "1.cls": b"0", "2.cls": b"1"})
    with pytest.raises(UserError, match="t/2: expected an image beside the label"):
        read_class_images(tar, None)
    assert read_class_images(tar, None, allow_missing=True).missing == ["t/2"]


def test_an_undecodable_image_is_named_when_it_is_loaded(folders: Path) -> None:
    (folders / "a/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a/1\.png: expected an image, but it cannot be decoded"):
        read_class_images(folders, None).images[0].load()


def test_a_large_image_in_a_tar_is_read_alone(tmp_path: Path) -> None:
    """Bytes come from their offset: what is read does not grow with the tar."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    tar = write_tar(tmp_path / "t.tar", {"1.png": buffer.getvalue(), "1.cls": b"0", "2.png": RED, "2.cls": b"1"})
    second = read_class_images(tar, None).images[1]
    with tar.open("r+b") as file:  # what lies before it may change
        file.write(os.urandom(1024))
    assert second.read() == RED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a JSON list of names"),
        (["a", ""], "expected a JSON list of names"),
        ({"a": 3}, "found 'a': 3"),
        ({"0": ["n1", "x"], "2": ["n2", "y"]}, "expected the indexes 0 to 1"),
        ({"0": ["n1", "x"], "1": ["n1", "y"]}, "the folder 'n1' has two classes"),
        (["only one"], "expected a name for each of the 2 folders"),
        ({"a": "apple"}, "expected a name for the folder 'b'"),
    ],
)
def test_a_faulty_class_file_is_named(folders: Path, tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_class_images(folders, classes(tmp_path, content))
    assert "classes.json" in str(caught.value)


def test_a_class_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UserError, match=r"c\.json"):
        read_class_file(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("label", "message"), [(b"3", "label out of range: expected 0 to 2"), (b"-1", "found -1"), (b"pear", "found 'pear'")]
)
def test_a_label_that_the_file_does_not_have(tmp_path: Path, label: bytes, message: str) -> None:
    tar = write_tar(tmp_path / "t.tar", {"1.png": RED, "1.cls": label})
    with pytest.raises(UserError, match=message) as caught:
        read_class_images(tar, classes(tmp_path, ["a", "b", "c"]))
    assert str(caught.value).startswith("t/1: ")


def test_faulty_folders_and_tars(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is not there"):
        read_class_images(tmp_path / "nothing", None)
    with pytest.raises(UserError, match="expected one folder of images a class, or tars"):
        read_class_images(folders / "a", None)
    (folders / "c").mkdir()
    with pytest.raises(UserError, match=r"val/c: expected images of a class, found none \(1 such folders"):
        read_class_images(folders, None)
    with pytest.raises(UserError, match=r"t/1: expected the label of the image in a member 1\.cls"):
        read_class_images(write_tar(tmp_path / "t.tar", {"1.png": RED}), None)
    with pytest.raises(UserError, match=r"t/1: expected a class in the \.cls member"):
        read_class_images(write_tar(tmp_path / "t.tar", {"1.png": RED, "1.cls": b" "}), None)
    with pytest.raises(UserError, match=r"expected images KEY\.jpg with labels KEY\.cls"):
        read_class_images(write_tar(tmp_path / "t.tar", {"1.txt": b"x"}), None)
    (tmp_path / "t.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        read_class_images(tmp_path / "t.tar", None)
