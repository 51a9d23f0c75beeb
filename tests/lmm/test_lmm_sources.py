"""Where conversations and images come from: JSON read by offset, folders, tars, tables of `datasets`."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_lmm import conversation, make_tokenizer
from torch.utils.data import DataLoader

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lmm.conversation import ConversationEncoder, load_template, parse_row
from lmm.data import ConversationDataset, check_samples
from lmm.faults import SampleFault
from lmm.images import TarImages, load_image
from lmm.rows import JsonRows, describe_sources, read_sources
from lmm.settings import ConversationSource

QUESTION = "<image>\nWhich colour?"


@pytest.fixture
def encoder() -> ConversationEncoder:
    return ConversationEncoder(make_tokenizer(), load_template("vicuna_v1"), "vicuna_v1", "<image>", 16, 400)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


class RawPixels:
    """Stands where the image processor does; keeps what it was given, so that sources can be compared exactly."""

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.cat([torch.from_numpy(np.asarray(image).copy()).flatten() for image in images])}


def write_tar(path: Path, folder: Path, prefix: str = "", names: list[str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.glob("*.png")):
            if names is None or file.name in names:
                tar.add(file, arcname=prefix + file.name)
    return path


def samples_of(source: ConversationSource, encoder: ConversationEncoder, workers: int = 0) -> list[dict[str, Any]]:
    rows, _ = check_samples(read_sources([source]), encoder, DropLedger(), 0)
    loader = DataLoader(ConversationDataset(rows, encoder, RawPixels()), batch_size=None, num_workers=workers, collate_fn=None)
    return list(loader)


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        if list(a["input_ids"]) != list(b["input_ids"]) or list(a["labels"]) != list(b["labels"]):
            return False
        if (a["pixel_values"] is None) != (b["pixel_values"] is None):
            return False
        if a["pixel_values"] is not None and not torch.equal(a["pixel_values"], b["pixel_values"]):
            return False
    return True


def as_messages(row: dict[str, Any], parts: bool) -> list[dict[str, Any]]:
    messages = []
    for turn in row["conversations"]:
        role, text = {"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"]
        if parts:
            pieces = [{"type": "image", "text": None}] if "<image>" in text else []
            text = [*pieces, {"type": "text", "text": text.replace("<image>\n", "")}]
        messages.append({"role": role, "content": text})
    return messages


def make_table(data: Path, parts: bool) -> datasets.Dataset:
    rows = json.loads((data / "chat.json").read_text())
    images = [
        [{"bytes": (data / "images" / row["image"]).read_bytes(), "path": None}] if "image" in row else [] for row in rows
    ]
    columns = {"id": [row["id"] for row in rows], "messages": [as_messages(row, parts) for row in rows], "images": images}
    table = datasets.Dataset.from_dict(columns)
    return table.cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("kind", ["tar", "tars", "saved", "saved_splits", "parquet", "parts"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_source_gives_the_samples_of_json_and_folder(
    kind: str, workers: int, data: Path, encoder: ConversationEncoder, tmp_path: Path
) -> None:
    expected = samples_of(ConversationSource(annotations=data / "chat.json", images=data / "images"), encoder)
    place = tmp_path / kind
    if kind == "tar":
        source = ConversationSource(annotations=data / "chat.json", images=write_tar(tmp_path / "i.tar", data / "images", "./"))
    elif kind == "tars":
        place.mkdir()
        names = sorted(file.name for file in (data / "images").iterdir())
        write_tar(place / "0.tar", data / "images", names=names[:5])
        write_tar(place / "1.tar", data / "images", names=names[5:])
        source = ConversationSource(annotations=data / "chat.json", images=place)
    else:
        table = make_table(data, parts=kind == "parts")
        if kind == "saved_splits":
            datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(place)
        elif kind == "parquet":
            place.mkdir()
            table.select(range(5)).to_parquet(place / "train-00000-of-00002.parquet")
            table.select(range(5, 12)).to_parquet(place / "train-00001-of-00002.parquet")
            table.select([0]).to_parquet(place / "test-00000-of-00001.parquet")
        else:
            table.save_to_disk(place)
        source = ConversationSource(annotations=place)
    assert same(samples_of(source, encoder, workers), expected)
    assert sum(sample["pixel_values"] is None for sample in expected) == 4


def test_table_faults_are_named_and_its_identity_follows_content(
    data: Path, encoder: ConversationEncoder, tmp_path: Path
) -> None:
    table = make_table(data, parts=False)
    identities = []
    for name, chosen in (("a", table), ("b", table), ("c", table.select(range(11)))):
        chosen.save_to_disk(tmp_path / name)
        identities.append({**describe_sources([ConversationSource(annotations=tmp_path / name)])[0], "annotations": ""})
    assert identities[0] == identities[1] != identities[2]
    assert identities[0]["images"] == 8
    with pytest.raises(UserError, match="split validation"):
        datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
        read_sources([ConversationSource(annotations=tmp_path / "splits", split="validation")])
    table.rename_column("messages", "chat").save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="column `messages`"):
        read_sources([ConversationSource(annotations=tmp_path / "other")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="parquet or arrow"):
        read_sources([ConversationSource(annotations=tmp_path / "empty")])


def test_table_may_name_its_images(data: Path, encoder: ConversationEncoder, tmp_path: Path) -> None:
    rows = json.loads((data / "chat.json").read_text())
    columns = {
        "messages": [as_messages(row, False) for row in rows],
        "images": [[row["image"]] if "image" in row else [] for row in rows],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "named")
    expected = samples_of(ConversationSource(annotations=data / "chat.json", images=data / "images"), encoder)
    source = ConversationSource(annotations=tmp_path / "named", images=data / "images")
    assert same(samples_of(source, encoder), expected)


def test_several_images_in_one_sample_and_text_only_in_between(
    data: Path, encoder: ConversationEncoder, tmp_path: Path
) -> None:
    rows = [
        conversation("two", "The first.", None, "<image>\n<image>\nWhich is wider?") | {"image": ["2.png", "1.png"]},
        conversation("none", "Hello.", None, "Hi"),
        conversation("turns", "Red.", "1.png"),
    ]
    rows[2]["conversations"] += [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "Blue."}]
    rows[2]["image"] = ["1.png", "2.png"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tar = write_tar(tmp_path / "images.tar", data / "images")
    found = samples_of(ConversationSource(annotations=tmp_path / "rows.jsonl", images=tar), encoder)
    wide, narrow = (np.asarray(Image.open(data / "images" / f"{number}.png")).flatten() for number in (2, 1))
    assert found[0]["pixel_values"].tolist() == [*wide, *narrow]
    assert found[1]["pixel_values"] is None
    assert found[2]["pixel_values"].tolist() == [*narrow, *wide]
    assert [sample["input_ids"].count(3) for sample in found] == [32, 0, 32]


def test_missing_and_damaged_members_are_counted(data: Path, encoder: ConversationEncoder, tmp_path: Path) -> None:
    whole = (data / "images" / "1.png").read_bytes()
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name, content in (("whole.png", whole), ("cut.png", whole[:-30]), ("../out.png", whole)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = [conversation(name, "Red.", name) for name in ("whole.png", "cut.png", "none.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ledger = DropLedger()
    source = ConversationSource(annotations=tmp_path / "rows.json", images=tmp_path / "images.tar")
    usable, _ = check_samples(read_sources([source]), encoder, ledger, 0)
    assert [row.value["id"] for row in usable] == ["whole.png"]
    assert ledger.counts() == {"undecodable image": 1, "missing image": 1}
    assert "no member none.png in images.tar" in ledger.rows()[1][2]


def test_tar_finds_each_of_many_members(tmp_path: Path) -> None:
    names = [f"coco/train2017/{number:012d}.jpg" for number in range(2000)]
    with tarfile.open(tmp_path / "many.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name if number else f"{'long/' * 40}x.jpg")
            member.size = number
            tar.addfile(member, io.BytesIO(bytes(number)))
    images = TarImages([tmp_path / "many.tar"])
    assert [images.find(name).size for name in names[1:]] == list(range(1, 2000))
    assert images.find("long/" * 40 + "x.jpg").size == 0
    with pytest.raises(SampleFault, match="missing image"):
        images.find(names[0])


@pytest.mark.parametrize(
    ("damage", "message"), [("cut", "whole, uncompressed tar"), ("gz", "whole, uncompressed tar"), ("twice", "same name")]
)
def test_damaged_tars_are_user_errors(damage: str, message: str, data: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images.tar", data / "images")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "gz":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(data / "images" / "1.png", arcname="1.png")
    else:
        with tarfile.open(path, "a") as tar:
            tar.add(data / "images" / "1.png", arcname="1.png")
    with pytest.raises(UserError, match=message):
        read_sources([ConversationSource(annotations=data / "chat.json", images=path)])


def test_image_that_went_away_after_the_check_is_a_user_error(data: Path, encoder: ConversationEncoder, tmp_path: Path) -> None:
    shutil.copytree(data / "images", tmp_path / "images")
    rows, _ = check_samples(
        read_sources([ConversationSource(annotations=data / "chat.json", images=tmp_path / "images")]), encoder, DropLedger(), 0
    )
    (tmp_path / "images" / "1.png").unlink()
    dataset = ConversationDataset(rows, encoder, RawPixels())
    with pytest.raises(UserError, match="readable before training"):
        dataset[1]


TRICKY = [
    {"id": "a", "text": 'quote " bracket ] comma , brace }'},
    {"id": "ü", "text": "猫 🐱 \u2028 naïve \\ \x85"},
    {"id": 3, "nested": [[1, 2], {"x": [None, True, -1.5e-3]}]},
    "text",
    [],
    7,
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_read_by_offset_are_those_of_the_parser(ascii_only: bool, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (json.dumps(TRICKY, ensure_ascii=ascii_only, indent=indent), " \n[7]\r\n"):
        path.write_bytes(text.encode())
        rows = pickle.loads(pickle.dumps(JsonRows(path)))
        assert [rows[number] for number in range(len(rows))] == json.loads(text)
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in TRICKY).encode() + b"\n\n")
    assert [JsonRows(lines)[number] for number in range(len(TRICKY))] == TRICKY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1} {"a": 2}]', "expected ',' or ']'"),
        (b'[{"a": 1}', "expected ',' or ']'"),
        (b"[1,]", "Expecting value"),
        (b"[1] 2", "more text after the end"),
        (b'{"a": 1}', "found an object"),
        (b'{"a": 1}\n{"a": 2}', "cannot be read"),
        (b'["\xff"]', "utf-8"),
        (b"", "cannot be read"),
        (b" [ ] ", "non-empty list"),
    ],
)
def test_what_is_no_json_list_is_a_user_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        JsonRows(tmp_path / "rows.json")


def test_rows_of_a_file_that_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[1, 2]")
    rows = JsonRows(path)
    path.write_text("[1, 2, 3]")
    with pytest.raises(UserError, match="has changed"):
        rows[0]


def test_a_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        JsonRows(tmp_path / "rows.jsonl")


def test_selected_rows_keep_their_keys_and_counts(data: Path, encoder: ConversationEncoder) -> None:
    source = ConversationSource(annotations=data / "chat.json", images=data / "images")
    rows, _ = check_samples(read_sources([source, source]), encoder, DropLedger(), 0)
    assert len(rows) == 24
    chosen = rows.select([13, 2])
    assert [row.key.rpartition("/")[2] for row in chosen] == ["chat.json#1:1", "chat.json#2:2"]
    assert [row.images for row in chosen] == [1, 1]
    assert chosen[0].length == len(encoder.encode(parse_row(chosen[0].value, data / "images").messages).input_ids)
    assert chosen.lengths.tolist() == [row.length for row in rows[13:14]] + [rows[2].length]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([{"type": "video"}], "unknown content part"),
        ([{"type": "text", "text": None}], "unknown content part"),
        (None, "malformed row"),
        ([{"type": "image"}, {"type": "text", "text": "Hi <image>"}], "image count"),
    ],
)
def test_faulty_messages_are_named(content: Any, cause: str) -> None:
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}], "images": ["a.png"]}
    with pytest.raises(SampleFault) as fault:
        parse_row(row, Path("images"))
    assert fault.value.cause == cause


def test_images_without_a_place_and_with_unusable_names_are_named() -> None:
    row = conversation("x", "Yes.", "a.png")
    for images, value, cause in (
        (None, "a.png", "no image folder"),
        (Path("i"), "/etc/passwd", "image outside its folder"),
        (Path("i"), 7, "malformed row"),
    ):
        with pytest.raises(SampleFault) as fault:
            parse_row(row | {"image": value}, images)
        assert fault.value.cause == cause
    with pytest.raises(SampleFault, match="undecodable image"):
        load_image(parse_row(row | {"image": {"bytes": b"no image", "path": "x.png"}}, None).images[0])
