"""`lift-eval cost`: reference FLOPs, counter against closed form, recipes, the files written, memory that was not measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from eval.__main__ import main
from eval.cost.command import are_papers, cost_row, flops_table, memory_table
from eval.cost.count import ClipRecipe, LiftRecipe, count_clip, count_lift, read_clip, read_lift
from eval.cost.memory import peak_memory, random_batch, training_step
from lift.common.errors import UserError
from lift.flops import training_flops
from lift.settings import ClipTextSettings, TextTransformSettings, VisionSettings

OFFICIAL = Path(__file__).parents[2] / "configs" / "official"
TINY_VISION = VisionSettings(image_size=32, patch_size=8, width=48, layers=2, heads=3)
TINY_TEXT = ClipTextSettings(width=32, layers=2, heads=2, embedding_dim=24, vocabulary_size=50)
TINY_RECIPES = """
objective: {objective}
vision: {{image_size: 32, patch_size: 8, width: 48, layers: 2, heads: 3}}
clip_text: {{width: 32, layers: 2, heads: 2, embedding_dim: 24, vocabulary_size: 50}}
"""


def test_reference_values_at_the_papers_scale() -> None:
    lift = count_lift(LiftRecipe())
    assert lift.flops / 1e9 == pytest.approx(105.27, abs=0.01)
    for tokens, flops, saved in ((77, 123.03, 14.4), (128, 135.35, 22.2), (323, 186.00, 43.4)):
        clip = count_clip(ClipRecipe(), tokens)
        row = cost_row(tokens, lift, clip, is_paper=True)
        assert clip.flops / 1e9 == pytest.approx(flops, abs=0.01)
        assert 100 * row["flops_saved"] == pytest.approx(saved, abs=0.05)
    assert cost_row(77, lift, count_clip(ClipRecipe(), 77), True)["flops_difference"] == pytest.approx(-0.111, abs=5e-4)


@pytest.mark.parametrize("tokens", [2, 17, 40])
def test_counter_and_closed_form_agree(tokens: int) -> None:
    lift = count_lift(LiftRecipe(TINY_VISION, 40))
    clip = count_clip(ClipRecipe(TINY_VISION, TINY_TEXT), tokens)
    assert lift.flops == pytest.approx(training_flops(TINY_VISION, 40, None), rel=1e-9)
    assert clip.flops == pytest.approx(training_flops(TINY_VISION, 24, TINY_TEXT, tokens), rel=1e-9)


def test_parameters_are_those_of_the_real_model() -> None:
    lift, clip = LiftRecipe(TINY_VISION, 40), ClipRecipe(TINY_VISION, TINY_TEXT)
    assert count_lift(lift).parameters == sum(p.numel() for p in lift.build().parameters())
    assert count_clip(clip, 9).parameters == sum(p.numel() for p in clip.build(9).parameters())
    # one more position embedding of the text tower's width a token
    assert count_clip(clip, 10).parameters - count_clip(clip, 9).parameters == TINY_TEXT.width


def test_official_recipes_are_the_papers_models_and_need_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIFT_DATA", raising=False)
    lift, clip = read_lift(OFFICIAL / "lift_long.yaml", None), read_clip(OFFICIAL / "clip_long.yaml")
    assert (lift.embedding_dim, lift.checkpointing, lift.precision) == (4096, True, "bf16")
    assert clip.text.context_length == 323
    assert are_papers(lift, clip)
    assert not are_papers(LiftRecipe(embedding_dim=384), clip)
    assert not are_papers(lift, ClipRecipe(TINY_VISION))


def test_fewer_dimensions_of_the_text_transform_make_a_smaller_head() -> None:
    whole = count_lift(LiftRecipe(TINY_VISION, 40)).parameters
    reduced = LiftRecipe(TINY_VISION, 40, TextTransformSettings(kind="pca", dimensions=10))
    assert whole - count_lift(reduced).parameters == 30 * 40 + 30


def test_command_writes_json_csv_and_a_page_that_needs_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, objective in (("lift", "contrastive"), ("clip", "clip")):
        (tmp_path / f"{name}.yaml").write_text(TINY_RECIPES.format(objective=objective))
    arguments = ["cost", "--lift", str(tmp_path / "lift.yaml"), "--clip", str(tmp_path / "clip.yaml")]
    assert main([*arguments, "--lengths", "[10]", "--memory_batch_size", "2", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [10, *range(16, 513, 16)]
    ours = next(row for row in found["rows"] if row["tokens"] == 10)
    assert ours["lift_flops"] == training_flops(TINY_VISION, 384, None)  # the embeddings are MiniLM's
    assert ours["clip_flops"] == training_flops(TINY_VISION, 24, TINY_TEXT, 10)
    assert ours["flops_saved"] == pytest.approx(1 - ours["lift_flops"] / ours["clip_flops"])
    assert all(row["paper_flops_saved"] is None for row in found["rows"])  # the paper says nothing of these models
    with (tmp_path / "out" / "cost.csv").open() as file:
        assert [int(row["clip_flops"]) for row in csv.DictReader(file)] == [row["clip_flops"] for row in found["rows"]]
    page = (tmp_path / "out" / "cost.html").read_text()
    assert "<script src=" not in page and "<link" not in page and page.count("Plotly.newPlot(") >= 2
    printed = capsys.readouterr().out
    assert f"{ours['clip_flops'] / 1e9:.2f}" in printed and "2 for each multiply-add" in printed
    if not torch.cuda.is_available():
        assert "was not measured" in printed and "was not measured" in page
        assert found["memory"].startswith("Peak memory was not measured")
        assert all(row["lift_memory"] is None and row["memory_saved"] is None for row in found["rows"])


def test_tables_show_ours_the_papers_and_the_difference() -> None:
    row = cost_row(77, count_lift(LiftRecipe()), count_clip(ClipRecipe(), 77), is_paper=True)
    assert flops_table([row]).rows == [["77", "105.27", "123.03", "14.4", "25.5", "-11.1"]]
    assert "6.8 % (n = 77)" in memory_table([row], None).note and memory_table([row], None).rows == []
    row |= {"lift_memory": 3 * 2**30, "clip_memory": 4 * 2**30, "memory_saved": 0.25, "memory_difference": 0.25 - 0.068}
    how = {"device": "D", "batch_size": 8, "precision": {"lift": "bf16", "clip": "fp32"}}
    how |= {"gradient_checkpointing": {"lift": True, "clip": False}}
    table = memory_table([row], how)
    assert table.rows == [["77", "3.00", "4.00", "25.0", "6.8", "+18.2"]]
    assert "LIFT bf16 and on, CLIP fp32 and off" in table.note


@pytest.mark.parametrize("recipe", [LiftRecipe(TINY_VISION, 40), ClipRecipe(TINY_VISION, TINY_TEXT)], ids=["lift", "clip"])
def test_the_step_that_is_measured_trains(recipe: LiftRecipe | ClipRecipe) -> None:
    torch.manual_seed(0)
    model = recipe.build(12)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = random_batch(model, recipe, 12, 6, torch.device("cpu"))
    losses = [training_step(model, optimiser, *batch, "fp32") for _ in range(25)]
    assert losses[0] > 1.0 > losses[-1]  # the six pairs are learned by heart


@pytest.mark.skipif(not torch.cuda.is_available(), reason="peak memory is measured on a CUDA device only")
def test_peak_memory_holds_weights_gradients_and_optimiser_states() -> None:
    recipe = ClipRecipe(TINY_VISION, TINY_TEXT)
    small, large = (peak_memory(recipe, 12, batch) for batch in (2, 64))
    assert large > small >= 4 * 4 * count_clip(recipe, 12).parameters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("vision: {width: x}", "Expected a <class 'int'>"),
        ("vision: [1]", "vision: expected keys and values"),
        ("visoin: {}", "Did you mean 'vision'"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "not valid YAML"),
        ("objective: clip", "Give it after --clip"),
        ("text_encoder: {kind: causal_lm, path: x}", "Give --embedding_dim"),
    ],
)
def test_recipe_that_cannot_be_counted_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml") as caught:
        read_lift(path, None)
    assert message in str(caught.value)


def test_refused_before_anything_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--out", str(tmp_path / "o"), "--clip", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["cost", "--out", str(tmp_path / "o"), "--clip", str(OFFICIAL / "lift_long.yaml")]) == 2
    assert "expected a recipe with objective clip" in capsys.readouterr().err
    assert main(["cost", "--out", str(tmp_path / "o"), "--lengths", "[1]"]) == 2
    assert "--lengths: expected at least 2, found 1" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert main(["cost", "--out", str(tmp_path / "other")]) == 2
    assert "Choose another --out" in capsys.readouterr().err
