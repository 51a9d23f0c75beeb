"""The chain is a list of commands that parse, LIFT and CLIP alike; its stages stop at the first failure."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from demo.chain import Stage, run, stages
from demo.settings import SIZES, RunSettings
from demo.text_encoders import results_table, stages_of, text_sides
from eval.tasks.hard_negatives import SUBTASKS
from lift.common.cli import Command
from lift.common.errors import UserError
from lift.common.settings import parse_settings


@pytest.mark.parametrize("size", list(SIZES))
def test_every_stage_is_a_command_that_parses(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_DEMO", str(tmp_path))
    chain = stages(RunSettings(out=tmp_path, size=size))  # type: ignore[arg-type]
    assert len({stage.name for stage in chain}) == len(chain) == 13
    for stage in chain:
        package, name, *arguments = stage.command
        command: Command = importlib.import_module(f"{package}.__main__").COMMANDS[name]
        parsed = parse_settings(command.settings, arguments, stage.name, "", command.positional)
        assert str(tmp_path) in str(parsed)


def test_lift_and_clip_stages_differ_only_in_the_name() -> None:
    by_name = {stage.name: stage.command for stage in stages(RunSettings(out=Path("out")))}
    assert sum("LIFT" in name for name in by_name) == 4
    for name, command in by_name.items():
        if "LIFT" in name:
            clip = [argument.replace("clip", "lift") for argument in by_name[name.replace("LIFT", "CLIP")]]
            assert clip == command


def test_times_are_kept_for_reused_stages_and_a_failure_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "works").mkdir()
    for name, body in (
        ("makes_once", "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.exists() or p.write_text('done')"),
        ("fails", "import sys; sys.exit(3)"),
    ):
        (tmp_path / "works" / f"{name}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "works"))
    made = tmp_path / "made.txt"
    chain = [Stage("first", ["makes_once", str(made)], made), Stage("second", ["fails"], tmp_path / "never")]
    monkeypatch.setattr(sys.modules["demo.chain"], "stages", lambda settings: chain)
    settings = RunSettings(out=tmp_path, until="first")
    run(settings)
    first = json.loads((tmp_path / "stages.json").read_text())
    run(settings)
    second = json.loads((tmp_path / "stages.json").read_text())
    assert [row["reused"] for row in (*first, *second)] == [False, True]
    assert first[0]["seconds"] == second[0]["seconds"]
    with pytest.raises(UserError, match="'second' ended with status 3"):
        run(RunSettings(out=tmp_path))
    with pytest.raises(UserError, match=r"no stage 'third'\. Stages are: first, second"):
        run(RunSettings(out=tmp_path, until="third"))


def test_text_sides_add_one_training_and_one_measurement_each(tmp_path: Path) -> None:
    rows = text_sides(tmp_path)
    chain = stages_of(rows, RunSettings(out=tmp_path))
    names = [stage.name for stage in chain]
    assert len(rows) == 7 and len(set(names)) == len(names)
    assert len(chain) == 7 + 2 * 5
    for stage in chain[7:]:
        package, name, *arguments = stage.command
        command: Command = importlib.import_module(f"{package}.__main__").COMMANDS[name]
        parse_settings(command.settings, arguments, stage.name, "", command.positional)


def test_table_shows_percent_by_kind() -> None:
    found = {f"sugarcrepe/{kind}": {"value": 0.5} for kind in SUBTASKS} | {"retrieval/image_to_text_r1": {"value": 0.25}}
    table = results_table(["CLIP"], [found])
    assert table.splitlines()[-1].split() == ["CLIP", *["50.00"] * 7, "25.00"]
