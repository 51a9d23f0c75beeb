"""`lift check-data`: counts, lengths, sizes, faults, duplicates, keys without embedding, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import encoded, noise_image, write_tar

from lift.__main__ import COMMANDS
from lift.common.cli import run_command
from lift.embed import embed
from lift.settings import EmbedSettings, SourceSettings, TextEncoderSettings


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """20 pairs: one truncated image, one empty caption, one image twice, one caption twice."""
    members: dict[str, bytes] = {}
    for i in range(20):
        content = encoded(noise_image(0 if i == 1 else i, (40 + i, 30)))
        members[f"{i}.png"] = content[:200] if i == 5 else content
        members[f"{i}.txt"] = b"" if i == 6 else b"the same" if i in (7, 8) else b"picture number " + b"one " * i
    members["1.png"] = members["0.png"]
    return write_tar(tmp_path / "pairs" / "0.tar", members)


def check(tmp_path: Path, tar: Path, llm: Path, *more: str) -> tuple[int, dict]:
    source = json.dumps([{"kind": "webdataset", "path": str(tar), "name": "w"}])
    arguments = ["check-data", "--data", source, "--out", str(tmp_path / "report"), "--tokenizer", str(llm), *more]
    status = run_command("lift", COMMANDS, arguments)
    return status, json.loads((tmp_path / "report" / "report.json").read_text())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_report_and_exit_status(tmp_path: Path, faulty: Path, tiny_llm: Path, workers: str) -> None:
    status, report = check(tmp_path, faulty, tiny_llm, "--workers", workers, "--max_length", "12")
    assert status == 2
    assert not report["usable"]
    assert (report["images"], report["captions"]) == (19, 19)
    assert report["dropped"] == {"undecodable image": 1, "empty caption": 1}
    assert report["drop_share"] == 0.1
    assert report["repeated_images"] == 1 and report["repeated_captions"] == 1
    assert (report["width"]["min"], report["width"]["max"], report["height"]["max"]) == (40, 59, 30)
    assert 0 < report["tokens"]["over_12"] < 19
    status, report = check(tmp_path, faulty, tiny_llm, "--workers", workers, "--max_drop_fraction", "0.2")
    assert status == 0 and report["usable"]
    dropped = [json.loads(line) for line in (tmp_path / "report" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["cause"]) for row in dropped] == [("w/5", "undecodable image"), ("w/6", "empty caption")]


def test_captions_without_embedding_are_counted(tmp_path: Path, pairs: Path, tiny_llm: Path) -> None:
    encoder = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
    source = SourceSettings(kind="webdataset", path=str(pairs), name="w")
    embed(EmbedSettings(data=[source], out=tmp_path / "store", text_encoder=encoder))
    members = {"000000012.png": encoded(noise_image(1)), "000000012.txt": b"a caption of another text"}
    write_tar(pairs / "00001.tar", members)
    more = ["--embeddings", str(tmp_path / "store"), "--workers", "0", "--max_drop_fraction", "0.5"]
    status, report = check(tmp_path, pairs, tiny_llm, *more)
    assert status == 0
    assert report["captions"] == 25 and report["captions_without_embedding"] == 1
    assert report["dropped"] == {"no embedding of a caption": 1}


def test_repeated_keys_are_reported_before_they_are_refused(tmp_path: Path, tiny_llm: Path) -> None:
    image = encoded(noise_image(0))
    for name in ("0", "1"):
        write_tar(
            tmp_path / "pairs" / f"{name}.tar", {"a.png": image, "a.txt": b"x", f"{name}b.png": image, f"{name}b.txt": b"y"}
        )
    status, report = check(tmp_path, tmp_path / "pairs", tiny_llm, "--workers", "0")
    assert status == 2 and not report["usable"]
    assert report["repeated_keys"] == 1 and report["images"] == 4
