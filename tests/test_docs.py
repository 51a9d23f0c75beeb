"""The commands in the guides parse: each fenced line that starts a room's command names existing options and values."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

import eval.__main__
import lift.__main__
import lmm.__main__
from lift.common.cli import Command
from lift.common.settings import parse_settings

REPOSITORY = Path(__file__).parents[1]
GUIDES = [REPOSITORY / "README.md", REPOSITORY / "configs" / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ROOMS = {"lift": lift.__main__.COMMANDS, "lmm": lmm.__main__.COMMANDS, "lift-eval": eval.__main__.COMMANDS}
SCRIPTS = {
    "pretrain_lift.sh": ("lift", "pretrain"),
    "pretrain_clip.sh": ("lift", "pretrain"),
    "slurm_pretrain_lift.sh": ("lift", "pretrain"),
    "slurm_train_llava.sh": ("lmm", "train"),
}


def fenced_lines(text: str) -> list[str]:
    """Lines of the bash blocks, those that go on after a backslash joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands_of(line: str) -> list[tuple[Command, list[str]]]:
    """The room's command in a shell line, also behind a launcher or in an entry point's script, with its arguments."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a string over several lines is another language
        return []
    for place, word in enumerate(words):
        room, after = Path(word).name, words[place + 1 :]
        if room in SCRIPTS:
            room, command = SCRIPTS[room]
            if after and not after[0].startswith("--") and "sbatch" not in words:
                after = ["--config", *after]
            elif "--config" not in after:
                recipe = next((word.removeprefix("RECIPE=") for word in words if word.startswith("RECIPE=")), None)
                after = ["--config", recipe or "configs/demo/lift.yaml", *after]
            return [(ROOMS[room][command], after)]
        if room in ROOMS and after:
            assert after[0] in ROOMS[room], line
            return [(ROOMS[room][after[0]], after[1:])]
    return []


FOUND = [(guide, line) for guide in GUIDES for line in fenced_lines(guide.read_text()) if commands_of(line)]


def test_commands_are_found_in_every_form() -> None:
    lines = [line for _, line in FOUND]
    for start in ("lift embed", ".venv/bin/lift-eval", "torchrun", "LAUNCH=", "RECIPE=", "bash scripts/pretrain_clip.sh"):
        assert any(line.startswith(start) for line in lines), start
    guide = (REPOSITORY / "docs" / "pretraining.md").read_text()
    assert [name for name in ROOMS["lift"] if f"\nlift {name} " not in guide] == []


@pytest.mark.parametrize(("guide", "line"), FOUND, ids=lambda value: value.name if isinstance(value, Path) else value[:60])
def test_command_parses(guide: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("LIFT_DATA", "LIFT_BENCHMARKS", "CLIP_TOKENIZER", "LLAVA_MODEL", "LLAVA_DATA"):
        monkeypatch.setenv(name, f"/{name.lower()}")
    ((command, arguments),) = commands_of(line)
    arguments = ["configs/demo/lift.yaml" if word == "CONFIG.yaml" else os.path.expandvars(word) for word in arguments]
    arguments = [word for word in arguments if word not in ("[--key", "value", "...]")]
    parse_settings(command.settings, arguments, line, "", command.positional)


def test_files_that_the_guides_link_to_are_there() -> None:
    for guide in GUIDES:
        for target in re.findall(r"\]\(([\w./-]+\.md)", guide.read_text()):
            assert (guide.parent / target).is_file(), (guide, target)


def test_headings_that_the_guides_link_to_are_there() -> None:
    headings = {
        guide: {_anchor(title) for title in re.findall(r"^#+ (.*)$", guide.read_text(), re.MULTILINE)} for guide in GUIDES
    }
    for guide in GUIDES:
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", guide.read_text()):
            assert anchor in headings[(guide.parent / target).resolve() if target else guide], (guide, anchor)


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
