"""`lift embed`: plain caption lists, restart after any kill, two jobs, a full disk, data that changed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embed_jobs
import numpy as np
import pytest
from tiny import encoded, noise_image, write_tar

from lift.__main__ import COMMANDS
from lift.captions import CaptionListShard, read_captions
from lift.common.cli import run_command
from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.embed import embed
from lift.repeated import look_up, repeated_captions
from lift.settings import EmbedSettings, SourceSettings, TextEncoderSettings
from lift.store import EmbeddingStore, text_hashes
from lift.store.shard_file import write_shard_file
from lift.text_encoders import Encoded, load_text_encoder
from lift.text_encoders.causal_lm import CausalLMEncoder

ODD_CAPTIONS = [
    "nul \0 inside",
    "🦊 the emoji 👩‍👩‍👧",
    "كلب على الشاطئ",
    "line\u2028separator\u0085inside",
    "word " * 10_000,
    "a" * 9_000,
]


def keyed(shards: list[CaptionListShard]) -> list[tuple[str, str]]:
    return [pair for shard in shards for pair in shard.keyed_captions()]


@pytest.fixture
def job(tiny_llm: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The arguments of `lift embed` of 40 captions, 15 of them twice, in 5 shards to a folder of the given name."""
    captions = tmp_path / "captions.jsonl"
    rows = [{"key": f"k{i}" + "x" * 100 * i, "caption": "caption " + "long " * (i % 25)} for i in range(40)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = ["--text-encoder", str(tiny_llm), "--text_encoder.batch_tokens", "64"]
    return lambda out: ["embed", "--captions", str(captions), "--shard-size", "8", *encoder, "--out", str(tmp_path / out)]


@pytest.mark.parametrize("shard_size", [1, 3, 100])
def test_lines_are_keyed_by_their_number_whatever_the_shards(tmp_path: Path, shard_size: int) -> None:
    path = tmp_path / "list.txt"
    lines = ["\ufefffirst", "  second\r", "", "fourth", " \t", *ODD_CAPTIONS, "last, without a line feed"]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    ledger = DropLedger()
    shards = read_captions(path, "lines", shard_size, ledger)
    kept = ["first", "second", "fourth", *(caption.strip() for caption in ODD_CAPTIONS), "last, without a line feed"]
    numbers = [1, 2, 4, *range(6, 13)]
    assert keyed(shards) == [(f"captions/{n}", caption) for n, caption in zip(numbers, kept, strict=True)]
    found = [(key, cause) for key, cause, _ in ledger.rows()]
    assert found == [("captions/13", "not UTF-8"), ("captions/3", "empty caption"), ("captions/5", "empty caption")]
    assert len({shard.name for shard in shards}) == len(shards) <= 13


def test_each_faulty_row_is_in_the_ledger_and_the_first_of_a_key_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    lines = [
        '{"key": "a", "caption": "one"}',
        '{"key": "a", "caption": "two"}',
        '{"key": 7, "caption": "seven"}',
        '{"key": "7", "caption": "seven again"}',
        '{"key": "b", "caption": "  "}',
        '{"key": "", "caption": "no key"}',
        '{"key": true, "caption": "no key"}',
        '{"key": "c", "caption": 3}',
        '["d", "list"]',
        '{"key": "cut',
        r'{"key": "e", "caption": "half a pair \ud83e"}',
        "[" * 100_000,
        "",
        r'{"key": "f", "caption": "whole pair \ud83e\udd8a, nul \u0000", "more": 1}',
        '{"key": "a", "caption": "three"}',
    ]
    path.write_text("\n".join(lines) + "\n")
    ledger = DropLedger()
    shards = read_captions(path, "jsonl", 2, ledger)
    assert keyed(shards) == [("a", "one"), ("7", "seven"), ("f", "whole pair 🦊, nul \0")]
    assert ledger.counts() == {"malformed record": 7, "duplicate key": 3, "empty caption": 2}
    assert ("captions/15", "duplicate key", "key 'a' is that of line 1") in ledger.rows()
    assert len(keyed(shards)) + len(ledger) == len(lines)


def test_a_list_without_a_caption_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no usable caption; dropped 2 of 2 samples: 2 empty caption"):
        read_captions(tmp_path / "list.txt", "lines", 10, DropLedger())
    with pytest.raises(UserError, match="expected a list of captions"):
        read_captions(tmp_path / "none.txt", "lines", 10, DropLedger())


def test_a_list_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    rows = 20_000
    path.write_text("".join(json.dumps({"key": str(i), "caption": f"{i} " + "x" * 500}) + "\n" for i in range(rows)))
    tracemalloc.start()
    try:
        shards = read_captions(path, "jsonl", 1000, DropLedger())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 4
    assert shards[13].keyed_captions()[7][0] == "13007"


def test_shard_names_follow_what_the_shards_yield(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"

    def names(*rows: tuple[str, str]) -> list[str]:
        path.write_text("".join(json.dumps({"key": key, "caption": caption}) + "\n" for key, caption in rows))
        return [shard.name for shard in read_captions(path, "jsonl", 2, DropLedger())]

    before = names(("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"))
    changed = names(("a", "1"), ("b", "2"), ("c", "3"), ("d", "5"))
    assert before[0] == changed[0] and before[1] != changed[1]
    repeated = names(("c", "1"), ("b", "2"), ("c", "3"), ("d", "4"))
    assert before[1] != repeated[1]
    shards = read_captions(path, "jsonl", 2, DropLedger())
    path.write_text(path.read_text().replace("4", "6"))
    with pytest.raises(UserError, match="was changed while"):
        keyed(shards)


def test_every_usable_caption_is_embedded_as_it_stands(
    tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"key": f"k{i}", "caption": text}) + "\n" for i, text in enumerate(ODD_CAPTIONS)) + "\n")
    encoder = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
    settings = EmbedSettings(captions=path, out=tmp_path / "store", text_encoder=encoder, shard_size=4, max_drop_fraction=0.2)
    embed(settings)
    store = EmbeddingStore(tmp_path / "store")
    texts = [text.strip() for text in ODD_CAPTIONS]
    rows = store.match("", [f"k{i}" for i in range(len(texts))], text_hashes(texts))
    assert rows.tolist() == list(range(len(texts)))
    np.testing.assert_allclose(store.rows(rows), load_text_encoder(encoder).encode(texts), atol=2e-3)
    size = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.arrow"))
    printed = capsys.readouterr().out
    assert f"6 embeddings, float16, {size / 6:.0f} bytes per caption, cosine error mean" in printed
    assert ", 2 captions cut; " in printed
    assert "dropped 1 of 7 samples: 1 empty caption" in printed
    before = embed_jobs.hashes(tmp_path / "store")
    embed(settings)
    assert "embeddings are complete, reused" in capsys.readouterr().out
    assert embed_jobs.hashes(tmp_path / "store") == before


class CountingEncoder:
    """Embeds a caption as its length, and keeps what it is given; "bad" is not a number, captions over 2 are truncated."""

    dimension = 2

    def __init__(self) -> None:
        self.given: list[list[str]] = []

    def encode_counted(self, captions: list[str], progress: str | None = None, known: Any = {}) -> Encoded:  # noqa: B006
        self.given.append([caption for caption in captions if caption not in known])
        rows = [known.get(caption, [np.nan if caption == "bad" else len(caption), 1]) for caption in captions]
        return Encoded(np.array(rows, np.float32), sum(len(caption) > 2 for caption in captions))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> CountingEncoder:
    counting = CountingEncoder()
    monkeypatch.setattr("lift.embed.load_text_encoder", lambda settings: counting)
    description = {"kind": "counting", "revision": "1"}
    monkeypatch.setattr("lift.embed.describe_text_encoder", lambda settings: description)
    monkeypatch.setattr("lift.text_encoders.describe_without_loading", lambda settings: description)
    return counting


def test_a_shard_is_one_call_and_a_caption_without_embedding_is_in_the_ledger(encoder: CountingEncoder, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("b\nbb\nb\nbad\nb\nbbb\n")
    embed(EmbedSettings(captions=tmp_path / "list.txt", out=tmp_path / "store", shard_size=5, max_drop_fraction=0.2))
    assert encoder.given == [["b", "bb", "b", "bad", "b"], ["bbb"]]
    store = EmbeddingStore(tmp_path / "store")
    texts = ["b", "bb", "b", "bad", "b", "bbb"]
    rows = store.match("", [f"captions/{n}" for n in range(1, 7)], text_hashes(texts))
    assert rows.tolist() == [0, 1, 2, -1, 3, 4]
    assert store.rows(rows[rows >= 0])[:, 0].tolist() == [1, 2, 1, 1, 3]
    assert store.manifest["truncated"] == 2
    dropped = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").read_text().splitlines()]
    assert dropped == [{"key": "captions/4", "cause": "embedding not finite", "detail": "captions/4"}]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_caption_of_several_shards_is_embedded_once(
    dtype: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows, the statistics and the ledger are those of embedding every shard for itself, in one batch size."""
    texts = [f"{'word ' * (i % 11)}x" for i in range(40)]
    captions = tmp_path / "list.txt"
    captions.write_text("".join(f"{text}\n" for text in texts))
    encoder = TextEncoderSettings(path=str(tiny_llm), kind="causal_lm", batch_tokens=1, max_length=9, precision="fp32")
    settings = EmbedSettings(captions=captions, text_encoder=encoder, shard_size=7, dtype=dtype, out=tmp_path / "once")
    forwarded: list[int] = []
    forward = CausalLMEncoder.forward
    monkeypatch.setattr(CausalLMEncoder, "forward", lambda self, rows: forwarded.append(len(rows)) or forward(self, rows))
    monkeypatch.setattr("lift.repeated.UNIT_CAPTIONS", 4)
    embed(settings)
    assert sum(forwarded) == 11
    monkeypatch.setattr("lift.embed.repeated_captions", lambda shards: [])
    embed(dataclasses.replace(settings, out=tmp_path / "each"))
    assert sum(forwarded) == 11 + 40
    assert embed_jobs.hashes(tmp_path / "once") == embed_jobs.hashes(tmp_path / "each")
    assert EmbeddingStore(tmp_path / "once").manifest["truncated"] > 5


def test_a_repeated_caption_without_embedding_is_dropped_from_every_shard(encoder: CountingEncoder, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\nbad\nbb\nbad\na\nccc\n")
    embed(EmbedSettings(captions=tmp_path / "list.txt", out=tmp_path / "store", shard_size=2, max_drop_fraction=0.4))
    assert [sorted(given) for given in encoder.given] == [["a", "bad"], ["bad"], ["bad", "bb"], ["ccc"]]
    store = EmbeddingStore(tmp_path / "store")
    assert store.rows(np.arange(len(store)))[:, 0].tolist() == [1, 2, 1, 3]
    dropped = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in dropped] == ["captions/2", "captions/4"]
    assert not (tmp_path / "store" / "repeated").exists()


def test_repeated_captions_are_cut_by_hash_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift.repeated.UNIT_CAPTIONS", 6)
    (tmp_path / "list.txt").write_text("".join(f"c{i % 30}\n" for i in range(50)))
    units = repeated_captions(read_captions(tmp_path / "list.txt", "lines", 25, DropLedger()))
    assert [len(unit.captions) for unit in units] == [6, 6, 6, 2]
    captions = [caption for unit in units for caption in unit.captions]
    assert sorted(captions) == sorted(f"c{i}" for i in range(20))
    hashes = text_hashes(captions)
    assert (hashes[1:] > hashes[:-1]).all()
    for unit in units:
        rows = np.array([[int(caption[1:]), 1] for caption in unit.captions], np.float32)
        write_shard_file(tmp_path / f"{unit.name}.arrow", "float32", unit.captions, unit.captions, rows)
    found = look_up(tmp_path, 2, ["c3", "c25", "c19", "nowhere", "c3"])
    assert {caption: row.tolist() for caption, row in found.items()} == {"c3": [3, 1], "c19": [19, 1]}


def test_finished_and_unfinished_stores_of_other_captions_are_refused(encoder: CountingEncoder, tmp_path: Path) -> None:
    path, store = tmp_path / "list.txt", tmp_path / "store"
    path.write_text("a\nb\n")
    settings = EmbedSettings(captions=path, out=store, shard_size=1)
    embed(settings)
    path.write_text("a\nc\n")
    with pytest.raises(UserError, match="it was made from other data"):
        embed(settings)
    (store / "manifest.json").unlink()
    before = embed_jobs.hashes(store)
    with pytest.raises(UserError, match=r"holds the shard captions-0000000002-\w+, which is not of this data"):
        embed(settings)
    assert embed_jobs.hashes(store) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("after", "key"), [(["first", "other"], "1#0"), (["first"], "1#0"), (["first", "second", "third"], "2#0")]
)
def test_other_captions_than_those_embedded_are_refused(
    encoder: CountingEncoder, tmp_path: Path, after: list[str], key: str, finished: bool
) -> None:
    def write(captions: list[str]) -> None:
        texts = {f"{i}.txt": caption.encode() for i, caption in enumerate(captions)}
        images = {f"{i}.png": encoded(noise_image(i)) for i in range(len(captions))}
        write_tar(tmp_path / "pairs" / "00000.tar", texts | images)

    write(["first", "second"])
    settings = EmbedSettings(data=[SourceSettings(kind="webdataset", path=str(tmp_path / "pairs"))], out=tmp_path / "store")
    embed(settings)
    if not finished:
        (tmp_path / "store" / "manifest.json").unlink()
    write(after)
    with pytest.raises(UserError, match=rf"00000\.arrow: the caption 'webdataset/{key}' is not what was embedded"):
        embed(settings)


def test_another_storage_type_is_refused(encoder: CountingEncoder, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\n")
    settings = EmbedSettings(captions=tmp_path / "list.txt", out=tmp_path / "store")
    embed(settings)
    settings.dtype = "int8"
    with pytest.raises(UserError, match=r"was made with \{'dtype': 'float16'\}, but this run asks for \{'dtype': 'int8'\}"):
        embed(settings)


def test_a_broken_shard_file_is_named(encoder: CountingEncoder, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\n")
    settings = EmbedSettings(captions=tmp_path / "list.txt", out=tmp_path / "store")
    embed(settings)
    (shard,) = (tmp_path / "store").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name}: the manifest states"):
        embed(settings)


def test_killed_before_any_of_its_renames_it_ends_with_the_same_bytes(job: Callable[[str], list[str]], tmp_path: Path) -> None:
    errors = tmp_path / "errors.txt"
    assert embed_jobs.run(job("whole"), errors) == 0, errors.read_text()
    whole = embed_jobs.hashes(tmp_path / "whole")
    assert len(EmbeddingStore(tmp_path / "whole")) == 40
    renames = 0
    while embed_jobs.run(job(f"killed{renames}"), errors, die_at_rename=renames) == -signal.SIGKILL:
        store = tmp_path / f"killed{renames}"
        assert list(store.rglob("*.partial")) and not (store / "manifest.json").exists()
        assert embed_jobs.run(job(store.name), errors) == 0, errors.read_text()
        assert embed_jobs.hashes(store) == whole
        renames += 1
    # the shards, the repeated captions, two descriptions of the encoder, the ledger, the manifest
    assert renames == 5 + 1 + 2 + 2


def test_killed_at_random_instants_it_ends_with_the_same_bytes(job: Callable[[str], list[str]], tmp_path: Path) -> None:
    errors = tmp_path / "errors.txt"
    assert embed_jobs.run(job("whole"), errors) == 0, errors.read_text()
    started = time.monotonic()
    assert embed_jobs.run(job("timed"), errors) == 0, errors.read_text()
    duration = time.monotonic() - started
    instants = random.Random(0)
    kills = 0
    for trial in range(3):
        for _ in range(3):
            process = embed_jobs.start(job(f"trial{trial}"), errors)
            process.join(instants.uniform(0, duration))
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        assert embed_jobs.run(job(f"trial{trial}"), errors) == 0, errors.read_text()
        assert embed_jobs.hashes(tmp_path / f"trial{trial}") == embed_jobs.hashes(tmp_path / "whole")
    assert kills > 0


def test_second_job_is_refused_while_the_first_lives(job: Callable[[str], list[str]], tmp_path: Path) -> None:
    first = embed_jobs.start(job("store"), tmp_path / "first.txt")
    while not list((tmp_path / "store").glob("*.arrow")):
        assert first.is_alive(), (tmp_path / "first.txt").read_text()
        time.sleep(0.002)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    assert not (tmp_path / "store" / "manifest.json").exists(), "the first job was not caught at work"
    assert embed_jobs.run(job("store"), tmp_path / "second.txt") == 2
    message = (tmp_path / "second.txt").read_text()
    assert (
        message == f"error: {tmp_path / 'store'}: another job is writing there. Wait for its end, or choose another folder.\n"
    )
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert embed_jobs.run(job("alone"), tmp_path / "alone.txt") == 0
    assert embed_jobs.hashes(tmp_path / "store") == embed_jobs.hashes(tmp_path / "alone")


def test_a_file_that_cannot_grow_is_one_message_and_a_restart_completes(
    job: Callable[[str], list[str]], tmp_path: Path
) -> None:
    errors = tmp_path / "errors.txt"
    assert embed_jobs.run(job("whole"), errors) == 0, errors.read_text()
    whole = embed_jobs.hashes(tmp_path / "whole")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "whole").glob("*.arrow"))
    assert embed_jobs.run(job("full"), errors, max_bytes=sizes[2]) == 2
    (message,) = [line for line in errors.read_text().splitlines() if "error:" in line]
    assert (
        f"[Errno {errno.EFBIG}]" in message and "Free room or mend the permissions, then run the same command again." in message
    )
    left = embed_jobs.hashes(tmp_path / "full")
    assert 0 < len(list((tmp_path / "full").glob("*.arrow"))) < 5
    assert {name: left[name] for name in left if not name.startswith("repeated/")}.items() <= whole.items()
    assert embed_jobs.run(job("full"), errors) == 0, errors.read_text()
    assert embed_jobs.hashes(tmp_path / "full") == whole


def test_a_full_disk_is_one_message_and_nothing_is_left_of_the_file(
    job: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync, left = os.fsync, [6]

    def full_after_some_files(descriptor: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_some_files)
    assert run_command("lift", COMMANDS, job("full")) == 2
    assert "error: [Errno 28] No space left on device. Free room" in capsys.readouterr().err
    assert sorted(path.suffix or path.name for path in (tmp_path / "full").glob("*.*")) == [*[".arrow"] * 3, ".json", ".lock"]
    left[0] = 100
    assert run_command("lift", COMMANDS, job("full")) == 0
    assert len(EmbeddingStore(tmp_path / "full")) == 40


def test_each_line_of_a_list_is_a_sample_whatever_its_key_looks_like(encoder: CountingEncoder, tmp_path: Path) -> None:
    lines = [{"key": f"flickr#{number}", "caption": "bad" if number == 3 else f"caption {number}"} for number in range(200)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    embed(EmbedSettings(captions=tmp_path / "list.jsonl", out=tmp_path / "store"))
    (row,) = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").read_text().splitlines()]
    assert row["key"] == "flickr#3" and len(EmbeddingStore(tmp_path / "store")) == 199
