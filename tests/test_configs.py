"""Every shipped recipe loads with the settings it is for, and the CLIP recipes are those of LIFT but for the text side."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lift.common.settings import parse_settings
from lift.settings import EmbedSettings, PretrainSettings
from lmm.settings import FinetuneSettings

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
SETTINGS = {"embed": EmbedSettings, "lift": PretrainSettings, "clip": PretrainSettings, "llava": FinetuneSettings}
TEXT_SIDE = {"objective", "embeddings", "text_encoder", "clip_text", "out"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_DATA", "/data")
    name = Path(recipe).stem.partition("_")[0]
    settings = parse_settings(SETTINGS[name], ["--config", str(CONFIGS / recipe)], recipe, "")
    assert "runs/" in str(settings.out)


@pytest.mark.parametrize("folder", sorted({Path(recipe).parent.as_posix() for recipe in RECIPES}))
def test_clip_recipe_is_like_for_like(folder: str) -> None:
    lift, clip = (yaml.safe_load((CONFIGS / folder / f"{name}.yaml").read_text()) for name in ("lift", "clip"))
    assert {key: lift.get(key) for key in lift.keys() - TEXT_SIDE} == {key: clip.get(key) for key in clip.keys() - TEXT_SIDE}


def test_every_recipe_stands_in_the_readme() -> None:
    text = (CONFIGS / "README.md").read_text()
    assert [recipe for recipe in RECIPES if f"`{recipe}`" not in text] == []
