"""The shell entry points: they parse, they are executable, and bad input to them ends with one message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))
ENTRY_POINTS = [path for path in SCRIPTS if not path.name.endswith("common.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) == (script in ENTRY_POINTS)


def test_every_script_and_recipe_of_the_readme_exists() -> None:
    named = set(re.findall(r"(?:scripts|docs|configs)/[\w./-]*\w", (REPOSITORY / "README.md").read_text()))
    assert "scripts/pretrain_lift.sh" in named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lift", "pretrain", "--config", "none.yaml"], "none.yaml: expected a YAML settings file"),
        (["lift", "pretrain", "--learning_rat", "1"], "Did you mean 'learning_rate'?"),
        (["lmm", "finetune", "--vision_towr", "x"], "Did you mean 'vision_tower'?"),
        (["lmm", "build", "--vision_tower", "none", "--llm", "none", "--out", "out"], "none"),
        (["eval", "lmm", "none", "--data", "none.tsv", "--out", "out"], "none: expected a LLaVA folder"),
        (["demo", "rum"], "Did you mean 'run'?"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_setup_names_what_is_missing(tmp_path: Path) -> None:
    environment = os.environ | {"CC": "no-such-compiler", "LIFT_EXTRAS": "nothing-installed-with-this"}
    done = subprocess.run(["bash", REPOSITORY / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no C compiler ('no-such-compiler') found" in done.stderr and "apt-get install gcc" in done.stderr
