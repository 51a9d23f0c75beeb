"""Every shipped recipe loads with the settings it is for, and the CLIP recipes are those of LIFT but for the text side.

The costs that the README estimates of the official recipes follow from the FLOPs of their models.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.encoder import chosen_tasks
from eval.settings import EncoderSettings
from lift.common.settings import parse_settings
from lift.flops import training_flops
from lift.settings import EmbedSettings, PretrainSettings
from lmm.settings import FinetuneSettings, TrainSettings

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
SETTINGS = {
    "embed": EmbedSettings,
    "lift": PretrainSettings,
    "clip": PretrainSettings,
    "llava": FinetuneSettings,
    "llava15": TrainSettings,
    "benchmarks": EncoderSettings,
}
TEXT_SIDE = {"objective", "embeddings", "text_encoder", "clip_text", "out"}
OFFICIAL = ("lift_short", "lift_long", "clip_short", "clip_long")
HALF_AN_H100 = 0.5 * 989e12
"""FLOP/s: half of what NVIDIA states for dense bf16."""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIFT_DATA", "LIFT_BENCHMARKS", "CLIP_TOKENIZER", "LLAVA_MODEL", "LLAVA_DATA"):
        monkeypatch.setenv(name, f"/{name.lower()}")
    for name in ("LIFT_DEMO", "LIFT_EMBEDDINGS", "NV_EMBED", "LLAVA_RUNS"):
        monkeypatch.delenv(name, raising=False)


def load(recipe: str, *arguments: str) -> Any:
    settings = SETTINGS[Path(recipe).stem.partition("_")[0]]
    positional = ["encoder"] if settings is EncoderSettings else []
    return parse_settings(settings, [*positional, "--config", str(CONFIGS / recipe), *arguments], recipe, "", bool(positional))


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "benchmarks" not in recipe])
def test_recipe_loads(recipe: str) -> None:
    assert str(load(recipe).out).startswith("runs/")


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if Path(recipe).name.startswith("llava")])
def test_llava_recipes_do_not_compile(recipe: str) -> None:
    """No gain was measured; docs/lmm_train.md says so."""
    settings = load(recipe)
    stages = [settings.stage1, settings.stage2] if isinstance(settings, FinetuneSettings) else [settings]
    assert not any(stage.compile for stage in stages if stage is not None)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "benchmarks" in recipe])
def test_benchmarks_name_tasks_and_their_paths(recipe: str) -> None:
    settings = load(recipe)
    for name, task in chosen_tasks(settings.tasks).items():
        assert getattr(settings, task.settings).path is not None, name


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if Path(recipe).name.startswith("clip")])
def test_clip_recipe_is_like_for_like(recipe: str) -> None:
    other = recipe.replace("/clip", "/lift")
    lift, clip = (yaml.safe_load((CONFIGS / name).read_text()) for name in (other, recipe))
    if recipe.startswith("official/"):  # the official baseline is not clipped
        assert (lift.pop("gradient_clip"), clip.pop("gradient_clip", 0)) == (1.0, None)
    assert {key: lift.get(key) for key in lift.keys() - TEXT_SIDE} == {key: clip.get(key) for key in clip.keys() - TEXT_SIDE}


def test_official_recipes_are_the_defaults_but_for_size_and_cost() -> None:
    """The defaults of `lift pretrain` are the official recipe's; a recipe that spells them out must not drift from them."""
    spelt = {
        "data",
        "out",
        "embeddings",
        "text_encoder",
        "captions",
        "batch_size",
        "precision",
        "gradient_checkpointing",
        "workers",
    }
    short, long = load("official/lift_short.yaml"), load("official/lift_long.yaml")
    for settings in (short, long):
        plain = PretrainSettings(data=settings.data, out=settings.out)
        changed = {
            field.name for field in dataclasses.fields(settings) if getattr(settings, field.name) != getattr(plain, field.name)
        }
        assert changed == spelt - {"data", "out"}
        assert settings.batch_size == 16384
    assert (short.text_encoder.max_length, long.text_encoder.max_length) == (77, 323)


def test_official_embeddings_are_those_that_the_official_recipes_train_on() -> None:
    """The long ones by the command in the recipe's comment."""
    text = (CONFIGS / "official" / "embed_nvembed.yaml").read_text()
    assert "--max-length 323 --out ${LIFT_EMBEDDINGS:-runs/official/embeddings}/long" in text
    source = re.search(r'--data "(.*)"', text)
    assert source is not None
    long = ["--max-length", "323", "--out", "runs/official/embeddings/long"]
    long += ["--data", source[1].replace("$LIFT_DATA", "/lift_data")]
    for name, arguments in (("short", []), ("long", long)):
        embed, lift = load("official/embed_nvembed.yaml", *arguments), load(f"official/lift_{name}.yaml")
        assert (embed.out, embed.data, embed.text_encoder) == (lift.embeddings, lift.data, lift.text_encoder)


@pytest.mark.parametrize("name", OFFICIAL)
def test_estimated_cost_follows_from_the_flops(name: str) -> None:
    settings = load(f"official/{name}.yaml")
    if settings.objective == "clip":
        text = settings.clip_text
        flops = training_flops(settings.vision, text.embedding_dim, text, text.context_length)
    else:
        flops = training_flops(settings.vision, 4096, None)
    row = next(
        line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith(f"| `official/{name}.yaml`")
    )
    hours = 1e9 * flops / HALF_AN_H100 / 3600
    assert [cell.strip() for cell in row.split("|")[-4:-1]] == [f"{flops / 1e9:.2f}", f"{hours:.1f}", f"{hours * 4 / 3:.1f}"]


def test_llava_recipes_have_the_published_hyperparameters() -> None:
    """Of arXiv 2310.03744, table 9: on 8 devices the global batches are 256 and 128; the stages chain."""
    first, second, lora, qlora = (
        load(f"llava15_vicuna7b_{name}.yaml") for name in ("stage1", "stage2", "stage2_lora", "stage2_qlora")
    )
    batches = [8 * settings.batch_size * settings.gradient_accumulation for settings in (first, second, lora, qlora)]
    assert batches == [256, 128, 128, 128]
    assert [settings.learning_rate for settings in (first, second, lora, qlora)] == [1e-3, 2e-5, 2e-4, 2e-4]
    assert [settings.template for settings in (first, second, lora, qlora)] == ["plain", "vicuna_v1", "vicuna_v1", "vicuna_v1"]
    for settings in (first, second, lora, qlora):
        common = (settings.epochs, settings.warmup_ratio, settings.weight_decay, settings.max_length, settings.precision)
        assert common == (1, 0.03, 0.0, 2048, "bf16")
    assert [settings.batching for settings in (first, second, lora, qlora)] == ["random", "grouped", "grouped", "grouped"]
    assert [settings.image_aspect_ratio for settings in (first, second, lora, qlora)] == ["crop", "pad", "pad", "pad"]
    assert second.model == lora.model == qlora.model == first.out
    assert (lora.lora.rank, lora.lora.alpha, lora.projector_learning_rate, lora.lora) == (128, 256, 2e-5, qlora.lora)
    assert (lora.quantise, qlora.quantise) == ("none", "nf4")


def test_every_recipe_stands_in_the_readme() -> None:
    text = (CONFIGS / "README.md").read_text()
    assert [recipe for recipe in RECIPES if f"`{recipe}`" not in text] == []
