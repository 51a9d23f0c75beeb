"""Image-caption sources: what is read, what goes to the ledger, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import encoded, noise_image, write_tar

from lift.common.errors import UserError
from lift.common.images import decode_image
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.sources import read_sources


def test_webdataset_keys_captions_and_bytes(pairs: Path) -> None:
    ledger = DropLedger()
    shards = read_sources([SourceSettings(kind="webdataset", path=pairs)], ledger)
    assert [(shard.name, len(shard.samples)) for shard in shards] == [("webdataset-00000", 12), ("webdataset-00001", 12)]
    sample = shards[1].samples[3]
    assert sample.key == "webdataset/000000015"
    assert sample.captions == {
        "webdataset/000000015#0": "picture number 000000015",
        "webdataset/000000015#1": "a noisy picture, 1 3",
    }
    assert decode_image(sample.image.read()).tobytes() == noise_image(15).tobytes()
    assert len(ledger) == 0


def test_faulty_samples_are_counted_by_cause(tmp_path: Path) -> None:
    image = encoded(noise_image(0))
    tar = write_tar(
        tmp_path / "0.tar",
        {
            "a.png": image,
            "a.txt": b"fine",
            "b.png": image,
            "b.txt": b"   ",
            "c.txt": b"no image",
            "d.png": image,
            "d.json": b"{",
        },
    )
    ledger = DropLedger()
    (shard,) = read_sources([SourceSettings(kind="webdataset", path=tar, name="w")], ledger)
    assert [sample.key for sample in shard.samples] == ["w/a"]
    assert {key: cause for key, cause, _ in ledger.rows()} == {
        "w/b": "empty caption",
        "w/c": "missing image",
        "w/d": "unreadable metadata",
    }


def test_coco_and_llava_json(tmp_path: Path) -> None:
    noise_image(1).save(tmp_path / "1.png")
    annotations = [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "two"}]
    coco = {"images": [{"id": 7, "file_name": "1.png"}], "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "three"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "x", "image": "1.png", "conversations": turns}]))
    shards = read_sources(
        [
            SourceSettings(kind="coco_captions", path=tmp_path / "coco.json", images=tmp_path),
            SourceSettings(kind="llava_json", path=tmp_path / "llava.json", images=tmp_path),
        ],
        DropLedger(),
    )
    assert [list(shard.samples[0].captions.items()) for shard in shards] == [
        [("coco_captions/7#0", "one"), ("coco_captions/7#1", "two")],
        [("llava_json/x#0", "three")],
    ]


def test_truncated_tar_is_refused(pairs: Path) -> None:
    tar = pairs / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"00000\.tar: not a whole, uncompressed tar"):
        read_sources([SourceSettings(kind="webdataset", path=pairs)], DropLedger())


def test_missing_folder_no_tars_empty_file_and_duplicate_keys(pairs: Path, tmp_path: Path) -> None:
    def read(*sources: SourceSettings) -> None:
        read_sources(list(sources), DropLedger())

    with pytest.raises(UserError, match="no such file"):
        read(SourceSettings(kind="webdataset", path=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found none"):
        read(SourceSettings(kind="webdataset", path=tmp_path / "empty"))
    (tmp_path / "empty.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(UserError, match="no usable image-caption pair"):
        read(SourceSettings(kind="coco_captions", path=tmp_path / "empty.json", images=tmp_path))
    with pytest.raises(UserError, match="two sources have a shard"):
        read(SourceSettings(kind="webdataset", path=pairs), SourceSettings(kind="webdataset", path=pairs))


def test_real_photos(shared: Path) -> None:
    ledger = DropLedger()
    data = shared / "data"
    shards = read_sources(
        [
            SourceSettings(kind="webdataset", path=data / "flickr8k_wds", name="flickr8k"),
            SourceSettings(kind="coco_captions", path=data / "coco_cc" / "captions.json", images=data / "coco_cc", name="coco"),
        ],
        ledger,
    )
    samples = [sample for shard in shards for sample in shard.samples]
    assert (len(samples), len(ledger)) == (787, 0)
    assert {len(sample.captions) for sample in samples[:700]} == {5}
    assert sum(len(sample.captions) for sample in samples[700:]) == 435
    assert decode_image(samples[-1].image.read()).mode == "RGB"


def test_same_stem_in_two_folders_is_two_samples_and_a_repeated_member_an_error(tmp_path: Path) -> None:
    image = encoded(noise_image(0))
    members = {"dog/1.txt": b"a dog", "dog/1.png": image, "./fox/1.png": image, "fox/1.txt": b"a fox"}
    tar = write_tar(tmp_path / "00000.tar", members)
    (shard,) = read_sources([SourceSettings(kind="webdataset", path=tar, name="w")], DropLedger())
    assert {sample.key: list(sample.captions.values()) for sample in shard.samples} == {
        "w/dog/1": ["a dog"],
        "w/fox/1": ["a fox"],
    }
    tar = write_tar(tmp_path / "00001.tar", {"1.png": image, "1.txt": b"a", "1.PNG": image})
    with pytest.raises(UserError, match=r"1\.PNG occurs twice"):
        read_sources([SourceSettings(kind="webdataset", path=tar)], DropLedger())


def test_captions_of_the_metadata_in_every_form(tmp_path: Path) -> None:
    image = encoded(noise_image(0))
    members: dict[str, bytes] = {}
    for number, record in enumerate(('{"captions": "a dog"}', '{"caption": "a cat"}', '{"width": 3}', "[1]", "{")):
        members |= {f"{number}.png": image, f"{number}.json": record.encode(), f"{number}.txt": b"from the text"}
    ledger = DropLedger()
    (shard,) = read_sources([SourceSettings(kind="webdataset", path=write_tar(tmp_path / "0.tar", members), name="w")], ledger)
    assert [list(sample.captions.values()) for sample in shard.samples] == [
        ["a dog"], ["a cat"], ["from the text"], ["from the text"],
    ]  # fmt: skip
    assert ledger.counts() == {"unreadable metadata": 1}


def test_malformed_json_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise_image(0)))
    turn = {"from": "gpt", "value": "a dog"}
    good = {"id": 1, "image": "a.png", "conversations": [turn]}
    rows = [good, "text", {**good, "id": 2, "image": "../a.png"}, {"id": 3, "image": "a.png"}, {"image": "a.png"}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    ledger = DropLedger()
    read_sources([SourceSettings(kind="llava_json", path=tmp_path / "llava.json", images=tmp_path)], ledger)
    assert ledger.counts() == {"malformed record": 3, "image outside its folder": 1}
    (tmp_path / "llava.json").write_text(json.dumps([good, good]))
    with pytest.raises(UserError, match=r"key 'llava_json/1' .* occurs twice"):
        read_sources([SourceSettings(kind="llava_json", path=tmp_path / "llava.json", images=tmp_path)], DropLedger())
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2}, 3],
        "annotations": [{"image_id": 1, "caption": "a dog"}, {"caption": "?"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    ledger = DropLedger()
    read_sources([SourceSettings(kind="coco_captions", path=tmp_path / "coco.json", images=tmp_path)], ledger)
    assert ledger.counts() == {"malformed record": 3}


def test_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "00000.tar", {f"{folder}.png": encoded(noise_image(0)), f"{folder}.txt": b"x"})
    sources = [SourceSettings(kind="webdataset", path=tmp_path / folder) for folder in ("a", "b")]
    with pytest.raises(UserError, match="two sources have a shard 'webdataset-00000'"):
        read_sources(sources, DropLedger())
