"""Image-caption sources: what is read, what goes to the ledger, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import encoded, noise_image, write_tar

from lift.common.errors import UserError
from lift.common.images import decode_image
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.sources import Samples, content_hash, read_sources, webdataset
from lift.sources.samples import read_images
from lift.sources.storage import _opened, read_ranges
from lift.store import text_hash


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
    assert Samples(shards).key(786) == samples[786].key == Samples(shards)[786].key
    assert [key for key, _ in shards[3].keyed_captions()] == [key for sample in shards[3] for key in sample.captions]


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


def counting_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the tars that are gone through from here on."""
    scanned: list[str] = []
    scan = webdataset.scan
    monkeypatch.setattr(
        webdataset, "scan", lambda source, origin, index: (scanned.append(origin.path), scan(source, origin, index))
    )
    return scanned


def test_index_is_built_once_and_again_when_the_tar_or_the_settings_change(
    pairs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = counting_scans(monkeypatch)
    source = SourceSettings(kind="webdataset", path=str(pairs))
    before = content_hash(read_sources([source], DropLedger()))
    assert content_hash(read_sources([source], DropLedger())) == before
    assert [Path(path).name for path in scanned] == ["00000.tar", "00001.tar"]
    assert len(list(cache.rglob("*.arrow"))) == 2
    write_tar(pairs / "00001.tar", {"x.png": encoded(noise_image(1)), "x.txt": b"another"})
    assert content_hash(read_sources([source], DropLedger())) != before
    assert [Path(path).name for path in scanned[2:]] == ["00001.tar"]
    only_text = replace(source, caption_fields=["txt"])
    (first, _) = read_sources([only_text], DropLedger())
    assert len(scanned) == 5 and list(first[0].captions.values()) == ["picture number 000000000"]
    beside = replace(source, index=pairs / "index")
    read_sources([beside], DropLedger())
    assert {path.name for path in (pairs / "index").rglob("*.json")} == {"webdataset-00000.json", "webdataset-00001.json"}
    other = replace(beside, path=str(pairs / "00001.tar"))  # of the same folder and name, and yet another source
    (alone,) = read_sources([other], DropLedger())
    assert list(alone[0].captions.values()) == ["another"]
    assert read_sources([beside], DropLedger())[0][0].key == "webdataset/000000000"


def test_dropped_samples_are_counted_again_from_the_index_and_images_that_came_are_found(tmp_path: Path) -> None:
    image = encoded(noise_image(0))
    write_tar(tmp_path / "0.tar", {"a.png": image, "a.txt": b"fine", "b.png": image, "b.txt": b" "})
    source = SourceSettings(kind="webdataset", path=str(tmp_path))
    for _ in range(2):
        ledger = DropLedger()
        read_sources([source], ledger)
        assert ledger.counts() == {"empty caption": 1}
    (tmp_path / "a.png").write_bytes(image)
    turns = [{"from": "gpt", "value": "a dog"}]
    records = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in "ab"]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    source = SourceSettings(kind="llava_json", path=str(tmp_path / "llava.json"), images=str(tmp_path))
    ledger = DropLedger()
    read_sources([source], ledger)
    assert ledger.counts() == {"missing image": 1}
    (tmp_path / "b.png").write_bytes(image)
    assert len(Samples(read_sources([source], DropLedger()))) == 2


def test_tars_behind_a_url(pairs: Path) -> None:
    memory = fsspec.filesystem("memory")
    for tar in pairs.glob("*.tar"):
        memory.pipe(f"/pairs/{tar.name}", tar.read_bytes())
    here = Samples(read_sources([SourceSettings(kind="webdataset", path=str(pairs))], DropLedger()))
    there = Samples(read_sources([SourceSettings(kind="webdataset", path="memory://pairs")], DropLedger()))
    assert [sample.captions for sample in here] == [sample.captions for sample in there]
    assert read_images([sample.image for sample in here]) == read_images([sample.image for sample in there])
    memory.rm("/pairs/00001.tar")
    contents = read_images([there[0].image, there[20].image])
    assert isinstance(contents[0], bytes) and isinstance(contents[1], OSError)
    with pytest.raises(UserError, match="memory://nowhere: expected a webdataset tar"):
        read_sources([SourceSettings(kind="webdataset", path="memory://nowhere")], DropLedger())
    with pytest.raises(UserError, match="cannot be reached"):
        read_sources([SourceSettings(kind="webdataset", path="nonsense://nowhere")], DropLedger())


def test_official_layout(shared: Path, tmp_path: Path) -> None:
    """The images of the fixture with caption files as the official code reads them; one image is not there."""
    layout = shared / "fixtures" / "official_layout"
    for number in range(2):
        stem = f"train-{number:05d}-of-00002"
        keys = [path.stem for path in sorted((layout / "images" / stem).iterdir())] + ["999"]
        columns = {"key": keys, "re_caption": [f"long {k}" for k in keys], "org_caption": ["short"] * len(keys)}
        table = pa.table(columns | {"extension": [".jpg"] * len(keys)})
        (tmp_path / "captions").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "captions" / f"{stem}.parquet")
    source = SourceSettings(
        kind="official_lift",
        path=str(tmp_path / "captions"),
        images=str(layout / "images"),
        caption_fields=["re_caption", "org_caption"],
    )
    ledger = DropLedger()
    shards = read_sources([source], ledger)
    assert [shard.name for shard in shards] == [f"official_lift-train-{n:05d}-of-00002" for n in range(2)]
    samples = Samples(shards)
    assert len(samples) == 20 and ledger.counts() == {"missing image": 2}
    key = "official_lift/train-00000-of-00002/000000000003"  # over 50,000 bytes: the official loader drops it
    sample = next(sample for sample in samples if sample.key == key)
    assert sample.captions == {f"{key}#0": "long 000000000003", f"{key}#1": "short"}
    assert len(sample.image.read()) > 50_000
    with pytest.raises(UserError, match="no_such is missing"):
        read_sources([replace(source, caption_fields=["no_such"])], DropLedger())


def test_hugging_face_table(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": encoded(noise_image(i)), "path": None} for i in range(5)]
    columns = {"image": images, "short": [f"s{i}" for i in range(5)], "long": [[f"l{i}", "more"] for i in range(5)]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    source = SourceSettings(kind="hf_dataset", path=str(tmp_path / "table"), name="t", caption_fields=["short", "long"])
    (shard,) = read_sources([source], DropLedger())
    assert shard[3].captions == {"t/000000003#0": "s3", "t/000000003#1": "l3", "t/000000003#2": "more"}
    assert decode_image(shard[3].image.read()).tobytes() == noise_image(3).tobytes()
    with pytest.raises(UserError, match="no column caption"):
        read_sources([replace(source, caption_fields=None)], DropLedger())


def test_large_files_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift.sources.SHARD_SAMPLES", 2)
    members: dict[str, bytes] = {}
    for i in range(5):
        members |= {f"{i}.png": encoded(noise_image(i)), f"{i}.txt": f"caption {i}".encode()}
    write_tar(tmp_path / "0.tar", members)
    shards = read_sources([SourceSettings(kind="webdataset", path=str(tmp_path), name="w")], DropLedger())
    assert [(shard.name, len(shard)) for shard in shards] == [("w-0-00000", 2), ("w-0-00001", 2), ("w-0-00002", 1)]
    assert [caption for shard in shards for _, caption in shard.keyed_captions()] == [f"caption {i}" for i in range(5)]
    keys, hashes = shards[1].caption_keys_and_hashes()
    assert keys.to_pylist() == ["w/2#0", "w/3#0"] and hashes.tolist() == [text_hash("caption 2"), text_hash("caption 3")]


def test_odd_captions_are_kept_and_unsafe_names_dropped(tmp_path: Path) -> None:
    texts = ["nul \0 inside", "emoji \U0001f408", "\u05e9\u05dc\u05d5\u05dd", "word " * 9_999 + "end"]
    image = encoded(noise_image(0))
    members: dict[str, bytes] = {"half.png": image, "half.json": b'{"caption": "half a pair \\ud83d"}'}
    for i, text in enumerate(texts):
        members |= {f"{i}.png": image, f"{i}.txt": text.encode()}
    members |= {"../up.png": image, "../up.txt": b"x", "/abs.png": image}
    ledger = DropLedger()
    (shard,) = read_sources([SourceSettings(kind="webdataset", path=str(write_tar(tmp_path / "0.tar", members)))], ledger)
    assert [caption for _, caption in shard.keyed_captions()] == ["half a pair ?", *texts]
    assert ledger.counts() == {"unsafe member name": 3}


def test_bad_header_in_the_middle_of_a_tar_is_refused(pairs: Path) -> None:
    tar = pairs / "00000.tar"
    content = bytearray(tar.read_bytes())
    offset = content.index(b"000000004.png")
    content[offset : offset + 300] = b"\xff" * 300
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"00000\.tar: not a whole, uncompressed tar"):
        read_sources([SourceSettings(kind="webdataset", path=str(pairs))], DropLedger())


def test_many_tars_are_indexed_by_processes(tmp_path: Path) -> None:
    for i in range(10):
        write_tar(tmp_path / f"{i:05d}.tar", {f"{i}.png": encoded(noise_image(i)), f"{i}.txt": b"x"})
    shards = read_sources([SourceSettings(kind="webdataset", path=str(tmp_path), name="w")], DropLedger())
    assert [sample.key for sample in Samples(shards)] == [f"w/{i}" for i in range(10)]


def test_keys_that_share_a_hash_are_two_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift.sources.index.text_hash", lambda text: 7)
    image = encoded(noise_image(0))
    write_tar(tmp_path / "0.tar", {"a.png": image, "a.txt": b"x", "b.png": image, "b.txt": b"y"})
    (shard,) = read_sources([SourceSettings(kind="webdataset", path=str(tmp_path), name="w")], DropLedger())
    assert len(shard) == 2
    write_tar(tmp_path / "1.tar", {"a.png": image, "a.txt": b"x"})
    with pytest.raises(UserError, match="key 'w/a' of w-0 occurs twice, again in w-1"):
        read_sources([SourceSettings(kind="webdataset", path=str(tmp_path), name="w")], DropLedger())


def index_again(source: SourceSettings, times: int) -> None:
    for _ in range(times):
        assert len(Samples(read_sources([source], DropLedger()))) == 1


def test_many_processes_may_index_one_source_at_once(tmp_path: Path) -> None:
    """An image is missing, so that each of them builds the index again."""
    (tmp_path / "a.png").write_bytes(encoded(noise_image(0)))
    records = [{"id": name, "image": f"{name}.png", "conversations": [{"from": "gpt", "value": "x"}]} for name in "ab"]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    source = SourceSettings(kind="llava_json", path=str(tmp_path / "llava.json"), images=str(tmp_path))
    processes = [multiprocessing.get_context("fork").Process(target=index_again, args=(source, 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_a_network_that_fails_is_asked_again(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/flaky/0.tar", (pairs / "00000.tar").read_bytes())
    samples = Samples(read_sources([SourceSettings(kind="webdataset", path="memory://flaky")], DropLedger()))
    fetch, left = type(memory).cat_ranges, [2]

    class Reset(Exception):
        """Of a client that does not use OSError."""

    def flaky(self: object, *arguments: object, **options: object) -> list[bytes]:
        left[0] -= 1
        if left[0] >= 0:
            raise Reset("connection reset")
        return fetch(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "cat_ranges", flaky)
    monkeypatch.setattr("lift.sources.storage.PAUSES", (0.0, 0.0, 0.0))
    assert decode_image(samples[0].image.read()).tobytes() == noise_image(0).tobytes()
    left[0] = 9
    with pytest.raises(OSError, match="Reset: connection reset"):
        samples[0].image.read()


def test_many_indexes_are_packed_and_read_as_before(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(7):
        members: dict[str, bytes] = {}
        for j in range(i % 3):  # some tars are empty
            members |= {f"{i}_{j}.png": encoded(noise_image(i * 3 + j)), f"{i}_{j}.txt": f"caption {i} {j}".encode()}
        write_tar(tmp_path / "tars" / f"{i}.tar", members)
    source = SourceSettings(kind="webdataset", path=str(tmp_path / "tars"), name="w")
    alone = read_sources([source], DropLedger())
    monkeypatch.setattr("lift.sources.packs.MOST_ALONE", 3)
    monkeypatch.setattr("lift.sources.packs.INDEXES_IN_A_PACK", 2)
    monkeypatch.setattr("lift.sources.SHARD_SAMPLES", 1)
    cut = read_sources([source], DropLedger())
    assert len(list(cache.rglob("pack-*.arrow"))) == 4
    assert {shard.index_file.name[:5] for shard in cut} == {"pack-"}
    assert list(Samples(cut)) == list(Samples(alone))
    assert [pair for shard in cut for pair in shard.keyed_captions()] == [pair for s in alone for pair in s.keyed_captions()]
    assert [Samples(cut).key(i) for i in range(len(Samples(cut)))] == [sample.key for sample in Samples(alone)]
    assert content_hash(cut) == content_hash(alone)
    assert np.concatenate([shard.caption_counts() for shard in cut]).tolist() == [1] * len(Samples(alone))


def test_threads_read_the_same_files_while_they_leave_the_cache_of_open_ones(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 64)
    ranges = [(str(tmp_path / str(number)), number, 32) for number in range(8)] * 40
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                _opened.cache_clear()
                found = list(pool.map(lambda item: read_ranges([item])[0], ranges))
                assert found == [bytes([number]) * 32 for number in range(8)] * 40
    finally:
        sys.setswitchinterval(interval)
