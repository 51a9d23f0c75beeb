"""The world on disk is deterministic, and every room reads its part without a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import settings
from demo.settings import Size, WorldSettings
from demo.world import write_world
from eval.lmm.tasks.mmbench import read_questions
from eval.settings import HardNegativeData, RetrievalData
from eval.tasks.hard_negatives import read_sugarcrepe
from eval.tasks.retrieval import read_retrieval
from lift.common.files import sha256_folder
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings
from lift.sources import read_sources
from lmm.conversation import parse_row

SIZE = Size(
    train_pairs=40, held_out_pairs=8, hard_negatives=5, question_groups=4, captioned_images=6, conversations=12, texts=24,
    pretrain_epochs=1, stage2_epochs=1,
)  # fmt: skip


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SIZES, "tiny", SIZE)


def _write(out: Path, seed: int = 0) -> Path:
    write_world(WorldSettings(out=out, size="tiny", seed=seed))
    return out


def test_same_seed_same_bytes_and_reuse(tiny_size: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = _write(tmp_path / "a"), _write(tmp_path / "b"), _write(tmp_path / "c", seed=1)
    assert sha256_folder(first) == sha256_folder(second) != sha256_folder(other)
    written = (first / "world.json").stat().st_mtime_ns
    _write(first)
    assert "reused" in capsys.readouterr().out
    assert (first / "world.json").stat().st_mtime_ns == written
    _write(first, seed=1)
    assert sha256_folder(first) == sha256_folder(other)


def test_every_room_reads_its_part(tiny_size: None, tmp_path: Path) -> None:
    world = _write(tmp_path / "world")
    ledger = DropLedger()
    shards = read_sources([SourceSettings(kind="webdataset", path=world / "pairs" / "train")], ledger)
    samples = [sample for shard in shards for sample in shard.samples]
    assert len(samples) == SIZE.train_pairs and len(ledger) == 0
    assert all(len(sample.captions) == 1 for sample in samples)
    held_out = read_retrieval("retrieval", RetrievalData(path=world / "pairs" / "held_out"), False)
    assert len(held_out.items.rows) == SIZE.held_out_pairs
    negatives = read_sugarcrepe(HardNegativeData(path=world / "sugar_crepe"), allow_missing=False)
    assert len(negatives.items) == 7 * SIZE.hard_negatives and not negatives.missing
    for file, count in (("captions", SIZE.captioned_images), ("conversations", SIZE.conversations)):
        rows = json.loads((world / "llava" / f"{file}.json").read_text())
        assert len(rows) == count
        for row in rows:
            assert all(path.is_file() for path in parse_row(row, world / "llava" / "images").images)
    questions = read_questions(world / "mmbench.tsv")
    assert len(questions) == 6 * 4 * SIZE.question_groups
    groups = {row["index"] % 1_000_000 for row in questions}
    assert len(groups) == 6 * SIZE.question_groups
    for group in groups:
        passes = [row for row in questions if row["index"] % 1_000_000 == group]
        assert len({row["image_sha256"] for row in passes}) == 1
        assert sorted(row["answer"] for row in passes) == ["A", "B", "C", "D"]
        assert len({row["options"][row["answer"]] for row in passes}) == 1
