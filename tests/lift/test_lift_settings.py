"""Settings: files, environment variables, command line, and the messages for what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from lift.common.errors import UserError
from lift.common.settings import parse_settings, save_settings
from lift.settings import EmbedSettings, PretrainSettings, SourceSettings

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


def parse_embed(*arguments: str) -> EmbedSettings:
    return parse_settings(EmbedSettings, list(arguments), "lift embed", "")


def test_short_forms_of_the_command_line_equal_the_long_ones(recipe: Path) -> None:
    short = parse_embed(
        *("--data", "webdataset:s3://bucket/{00..10}.tar", "--data=coco_captions:a,b.json,images=photos,name=coco"),
        *(
            "--text-encoder",
            "models/llm",
            "--text_encoder.kind",
            "causal_lm",
            "--instruction",
            "Embed: a=b",
            "--max-length",
            "40",
        ),
        *("--out", "store", "--max-drop-fraction=0.5"),
    )
    sources = [
        {"kind": "webdataset", "path": "s3://bucket/{00..10}.tar"},
        {"kind": "coco_captions", "path": "a,b.json", "images": "photos", "name": "coco"},
    ]
    encoder = {"kind": "causal_lm", "path": "models/llm", "prompt": "Embed: a=b", "max_length": 40}
    nested = [f"--text_encoder.{key}={value}" for key, value in encoder.items()]
    assert short == parse_embed("--data", json.dumps(sources), *nested, "--out", "store", "--max_drop_fraction", "0.5")
    assert short == parse_embed(
        *("--data", json.dumps(sources[0]), "--data", json.dumps([sources[1]])),
        *("--text_encoder", json.dumps(encoder), "--out", "store", "--max_drop_fraction", "0.5"),
    )
    assert short.data[1] == SourceSettings(kind="coco_captions", path="a,b.json", images="photos", name="coco")


def test_sources_on_the_command_line_take_the_place_of_the_files_or_with_plus_join_them(recipe: Path) -> None:
    def names(*arguments: str) -> list[str]:
        return [str(source.path) for source in parse("--config", str(recipe), *arguments).data]

    assert names("--data", "webdataset:a", "--data", "webdataset:b") == ["a", "b"]
    assert names("--data+", "webdataset:a", "--data+=webdataset:b") == ["nowhere", "a", "b"]


def test_text_encoder_as_a_string_sets_its_path_alone(tmp_path: Path) -> None:
    path = tmp_path / "embed.yaml"
    path.write_text("captions: list.txt\nout: store\ntext_encoder: {kind: causal_lm, path: a, pooling: last}\n")
    settings = parse_embed("--config", str(path), "--text-encoder", "b")
    assert (settings.text_encoder.path, settings.text_encoder.kind, settings.text_encoder.pooling) == ("b", "causal_lm", "last")


@dataclass
class Switches:
    """Settings of a command with a switch."""

    name: str
    be_quick: bool = False


def test_a_switch_needs_no_value_and_leaves_what_follows_alone() -> None:
    def parsed(*arguments: str) -> Switches:
        return parse_settings(Switches, list(arguments), "test", "", positional=True)

    for on in (["a", "--be-quick"], ["--be_quick", "a"], ["--be-quick", "true", "a"], ["a", "--be-quick=true"]):
        assert parsed(*on) == Switches("a", be_quick=True)
    assert parsed("--be-quick", "false", "a") == Switches("a", be_quick=False)


def test_help_tells_the_short_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_embed("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--data takes KIND:PATH[,KEY=VALUE...]" in text
    assert "--text_encoder takes the folder or hub name of a model." in text
    assert "--max_length for --text_encoder.max_length" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "some/folder"], "--data: expected KIND:PATH with one of the kinds webdataset, official_lift"),
        (["--data", "webdatset:a"], "found 'webdatset:a'"),
        (["--data", "webdataset:"], "found 'webdataset:'"),
        (["--data", "coco_captions:a.json"], "a source of kind coco_captions needs the folder of its images"),
        (["--data", "coco_captions:a.json,image=b"], "--data: unknown key 'image'. Did you mean 'images'?"),
        (["--data", '[{"kind": "webdataset", "pth": "a"}]'], "--data: unknown key 'pth'. Did you mean 'path'?"),
        (["--data", "[{"], "--data: not valid JSON"),
        (["--data", "webdataset:a", "--max-lenght", "3"], "unknown option '--max-lenght'. Did you mean 'max_length'?"),
        (
            ["--data", "webdataset:a", "--text-encoder", "b", "--text_encoder.kind", "minilm"],
            "kind minilm takes no path, found b",
        ),
        (["--data", "webdataset:a", "--captions", "b.txt"], "expected either data or captions"),
        ([], "expected either data or captions"),
        (["--captions", "b.csv"], "the suffix of b.csv tells no format. Give captions_format"),
        (["--captions", "b.txt", "--shard-size", "0"], "shard_size: expected at least 1, found 0"),
        (["--captions", "b.txt", "--workers", "2"], "workers: 2 workers need --engine ray"),
        (["--captions", "b.txt", "--instruction"], "text_encoder.prompt: expected one argument"),
    ],
)
def test_each_fault_of_the_command_line_is_one_message(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_embed("--out", "store", *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_paths_takes_one_path_and_grows_when_repeated() -> None:
    @dataclass
    class Runs:
        """Runs."""

        more: list[Path]
        """Folders."""
        form: Literal["table", "records"] | None = None
        """Form."""

    for arguments in (["--more", "a", "--more", "b"], ["--more", "[a,b]"], ["--more", '["a"]', "--more=b"]):
        assert parse_settings(Runs, arguments, "lift", "").more == [Path("a"), Path("b")]
    assert parse_settings(Runs, ["--more", "a", "--form", "null"], "lift", "").form is None
    with pytest.raises(UserError, match=r"--form: unknown value 'tabel'\. Did you mean 'table'\?"):
        parse_settings(Runs, ["--more", "a", "--form", "tabel"], "lift", "")
