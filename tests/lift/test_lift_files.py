"""Files and folders: whole or not at all, never over something else, and read as they were written."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ImageFile
from tiny import encoded, noise_image

from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_jsonl, read_whole_rows, write_jsonl
from lift.common.images import ImageFault, decode_image


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        _ = 1 / 0
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    with atomic_folder(target) as folder:
        (folder / "c").write_text("3")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "out"]


def test_what_a_killed_process_left_is_swept_and_a_running_ones_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = platform.node().replace(".", "_")
    left, running = tmp_path / f"out.{host}-{gone.pid}-0a.partial", tmp_path / f"out.{host}-1-0b.partial"
    for folder in (left, running):
        folder.mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert not left.exists() and running.exists()


def test_output_folder_must_be_new_empty_or_ours(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new", "mark")
    check_output_folder(tmp_path, "mark")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"expected a new folder or an earlier result \(with mark\)"):
        check_output_folder(tmp_path, "mark")
    (tmp_path / "mark").write_text("")
    check_output_folder(tmp_path, "mark")


def test_lines_break_only_at_line_feeds(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u2029c\u0085d"}, {"text": "e"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"cut')
    assert read_whole_rows(tmp_path / "rows.jsonl") == rows
    with pytest.raises(UserError, match=r"rows\.jsonl:3"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_undecodable_bytes_are_one_kind_of_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as a library may leave it
    whole = encoded(noise_image(0, (64, 64)), "jpeg")
    assert decode_image(whole).size == (64, 64)
    for content in (b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(20), whole[: len(whole) // 3]):
        with pytest.raises(ImageFault):
            decode_image(content)
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "none.png")
