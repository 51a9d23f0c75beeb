"""Cached features of the vision tower: those of the model, whole on disk, made again when damaged, and the same training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from lift.common.errors import UserError
from lift.common.files import read_json
from lift.common.ledger import DropLedger
from lmm.build import build
from lmm.data import ConversationDataset, check_samples, read_sources
from lmm.feature_cache import (
    CachedDataset,
    FeatureCache,
    cached_dataset,
    image_key,
    load_tower,
    take_features,
    tower_features,
)
from lmm.settings import BuildSettings, ConversationSource, StageSettings
from lmm.train import load_processor, make_encoder, train_stage

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("features") / "model"))


@pytest.fixture
def stage(data: Path, tmp_path: Path) -> StageSettings:
    source = ConversationSource(annotations=data / "caption.json", images=data / "images")
    return StageSettings(
        data=[source], max_steps=4, batch_size=4, workers=0, logging_steps=1, cache_features=tmp_path / "cache"
    )


def dataset_of(model: Path, stage: StageSettings) -> ConversationDataset:
    processor, llava = load_processor(model)
    rows, _ = check_samples(read_sources(stage.data), make_encoder(processor, llava, stage, model), DropLedger(), workers=0)
    return ConversationDataset(rows, make_encoder(processor, llava, stage, model), processor.image_processor)


def cached(model: Path, stage: StageSettings) -> CachedDataset:
    return cached_dataset(dataset_of(model, stage), stage, model, load_processor(model)[1], rank=0, world_size=1)


def files(stage: StageSettings) -> dict[Path, int]:
    assert stage.cache_features is not None
    return {path: path.stat().st_mtime_ns for path in stage.cache_features.rglob("*.f16")}


def test_cached_features_are_those_of_the_model(model: Path, stage: StageSettings) -> None:
    plain, with_cache = dataset_of(model, stage), cached(model, stage)
    llava: Any = LlavaForConditionalGeneration.from_pretrained(model).eval()
    pixels = plain[5]["pixel_values"]
    expected = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    found = with_cache[5]["pixel_values"]
    assert (found.dtype, found.shape) == (torch.float16, (1, 16, 16))
    assert torch.allclose(found.float(), expected, atol=2e-3)
    assert with_cache[5]["input_ids"] == plain[5]["input_ids"]
    through_tower = llava.get_image_features(pixels).pooler_output[0]
    llava.model.vision_tower.requires_grad_(False)
    take_features(llava.config, llava.model.vision_tower)
    from_cache = llava.get_image_features(found.float()).pooler_output[0]
    assert torch.allclose(from_cache, through_tower, atol=1e-3)
    assert torch.equal(llava.get_image_features(expected).pooler_output[0], through_tower)


def test_same_images_share_a_file_whatever_their_name(tmp_path: Path, data: Path) -> None:
    first = Image.open(data / "images" / "1.png").convert("RGB")
    first.save(tmp_path / "renamed.png", compress_level=0)
    assert image_key(Image.open(tmp_path / "renamed.png").convert("RGB")) == image_key(first)
    assert image_key(first.rotate(90, expand=True)) != image_key(first)


def test_caching_goes_on_and_makes_damaged_files_again(
    model: Path, stage: StageSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = cached(model, stage)
    before = files(stage)
    assert len(before) == 12
    content = {path: path.read_bytes() for path in before}
    missing, cut, flipped, *rest = sorted(before)
    missing.unlink()
    cut.write_bytes(content[cut][:-50])
    flipped.write_bytes(bytes([content[flipped][0] ^ 1]) + content[flipped][1:])
    again = cached(model, stage)
    assert "12 images, 3 computed" in capsys.readouterr().out
    assert again.keys == whole.keys
    assert {path: path.read_bytes() for path in files(stage)} == content
    assert all(files(stage)[path] == before[path] for path in rest)


def test_a_file_damaged_during_training_is_named(model: Path, stage: StageSettings) -> None:
    with_cache = cached(model, stage)
    path = with_cache.cache.path(with_cache.keys[0][0])
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=path.name):
        with_cache[0]


@pytest.mark.parametrize("what", ["tower", "preprocessing", "precision"])
def test_other_features_lie_in_another_folder(what: str, model: Path, stage: StageSettings, tmp_path: Path) -> None:
    first = cached(model, stage).cache.folder
    other, changed = model, stage
    if what == "tower":
        llava: Any = LlavaForConditionalGeneration.from_pretrained(model)
        with torch.no_grad():
            llava.model.vision_tower.embeddings.class_embedding[0] += 1e-3
        other = tmp_path / "other"
        llava.save_pretrained(other)
        load_processor(model)[0].save_pretrained(other)
    elif what == "preprocessing":
        other = tmp_path / "other"
        other.mkdir()
        for file in model.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        written = json.loads((other / "processor_config.json").read_text())
        written["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
        (other / "processor_config.json").write_text(json.dumps(written))
    else:
        changed = dataclasses.replace(stage, precision="bf16")
    assert cached(other, changed).cache.folder != first
    assert len(files(stage)) == 24


def test_unusable_folders_features_and_towers_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        FeatureCache(tmp_path / "file", {}, (2, 2))
    with pytest.raises(UserError, match="range of float16"):
        FeatureCache(tmp_path / "cache", {}, (2, 2)).write("ab", torch.full((2, 2), 1e6))
    llava: Any = LlavaForConditionalGeneration.from_pretrained(model)
    with pytest.raises(UserError, match="vision tower learns"):
        take_features(llava.config, llava.model.vision_tower)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded by itself"):
        load_tower(tmp_path / "empty", llava.config, torch.float32)


def test_tower_features_need_no_gradient(model: Path) -> None:
    tower = load_tower(model, load_processor(model)[1], torch.float32)
    assert not tower_features(tower, torch.zeros(2, 3, 32, 32), -2).requires_grad


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_training_with_the_cache_has_the_same_losses_and_a_whole_folder(
    zero_stage: int, model: Path, stage: StageSettings, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    settings = dataclasses.replace(stage, zero_stage=zero_stage, packing=zero_stage == 3)
    plain = train_stage(model, tmp_path / "plain", dataclasses.replace(settings, cache_features=None))
    with_cache = train_stage(model, tmp_path / "with_cache", settings)
    losses = [[row["loss"] for row in read_json(out / "train.json")["losses"]] for out in (plain, with_cache)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two, before = (load_file(folder / "model.safetensors") for folder in (plain, with_cache, model))
    assert one.keys() == two.keys()
    towers = [name for name in one if name.startswith("vision_tower.")]
    assert towers
    assert all(torch.equal(two[name], before[name]) for name in towers)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3
