"""Settings: files, environment variables, command line, and the messages for what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lift.common.errors import UserError
from lift.common.settings import parse_settings, save_settings
from lift.settings import PretrainSettings

RECIPE = (
    "data:\n- {kind: webdataset, path: '${PAIRS:-nowhere}'}\nout: run\nvision: {width: 64, heads: 4}\nlearning_rate: 1e-4\n"
)


def parse(*arguments: str) -> PretrainSettings:
    return parse_settings(PretrainSettings, list(arguments), "lift pretrain", "")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_command_line_wins_over_file_and_nested_values_merge(recipe: Path) -> None:
    settings = parse("--config", str(recipe), "--vision.width", "96", "--epochs", "2")
    assert (settings.vision.width, settings.vision.heads, settings.epochs) == (96, 4, 2.0)
    assert settings.learning_rate == 1e-4
    assert settings.embeddings == Path("run/embeddings")


def test_later_file_wins(recipe: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("vision: {heads: 2}\n")
    settings = parse("--config", str(recipe), "--config", str(second))
    assert (settings.vision.width, settings.vision.heads) == (64, 2)


def test_environment_variables_are_expanded(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--config", str(recipe)).data[0].path == "nowhere"
    monkeypatch.setenv("PAIRS", "/somewhere")
    assert parse("--config", str(recipe)).data[0].path == "/somewhere"


def test_saved_settings_read_back_equal(recipe: Path, tmp_path: Path) -> None:
    settings = parse("--config", str(recipe))
    save_settings(settings, tmp_path / "saved.yaml")
    assert parse("--config", str(tmp_path / "saved.yaml")) == settings


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("learning_rat: 1", [], "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        ("vision: {widht: 1}", [], "unknown key 'vision.widht'. Did you mean 'vision.width'?"),
        ("data: [{kind: webdataset, pth: x}]", [], "unknown key 'data.pth'. Did you mean 'data.path'?"),
        ("out: '${NOT_SET_ANYWHERE}'", [], "needs the environment variable NOT_SET_ANYWHERE"),
        ("out: [", [], "not valid YAML"),
        (RECIPE, ["--epoch", "1"], "unknown option '--epoch'. Did you mean 'epochs'?"),
        (RECIPE, ["--epochs", "many"], "epochs"),
        (RECIPE, ["--epochs", "-1"], "epochs: expected a positive number, found -1.0"),
        (RECIPE, ["--vision.heads", "5"], "vision.width: 64 is not a multiple of the number of heads 5"),
        (RECIPE, ["--objective", "clop"], "clop"),
        ("out: x", [], "data"),
    ],
)
def test_each_fault_is_one_message(tmp_path: Path, content: str, arguments: list[str], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        parse("--config", str(path), *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_config_file() -> None:
    with pytest.raises(UserError, match="no such file"):
        parse("--config", "nowhere.yaml")
