"""`lmm import` and `lmm export`: logits and tensors against a checkpoint of the original LLaVA, a round trip, and refusals."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lmm.build import build, load_tower
from lmm.conversation import IGNORED_LABEL, ConversationEncoder, SampleFault, load_template, parse_row
from lmm.llava_export import export_llava
from lmm.llava_import import import_llava
from lmm.sentencepiece_model import llama_tokenizer
from lmm.settings import BuildSettings, ExportSettings, ImportSettings
from lmm.tensor_files import read_all, read_tensors

ORIGINAL_IMAGE = -200


@pytest.fixture
def original(shared: Path) -> Path:
    return shared / "fixtures" / "llava_ckpt"


@pytest.fixture(scope="module")
def built(tower: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path_factory.mktemp("built") / "model"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for tensors in read_all(folder) for key, value in tensors.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key])] == []


def logits_of(folder: Path, original: Path, pair: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(
        text=pair["prompt"], images=Image.open(original / "images" / pair["image"]).convert("RGB"), return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits[0], inputs


@pytest.mark.parametrize("name", ["wide_pad", "tall_pad"])
def test_imported_checkpoint_equals_the_original(name: str, original: Path, tmp_path: Path) -> None:
    out = import_llava(ImportSettings(original / "ckpt_full", out=tmp_path / "out"))
    pair = next(pair for pair in json.loads((original / "meta.json").read_text())["pairs"] if pair["name"] == name)
    reference = np.load(original / f"{name}.npz")
    logits, inputs = logits_of(out, original, pair)
    image_id = json.loads((out / "config.json").read_text())["image_token_index"]
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(image_id) == 16
    first = ids.index(image_id)
    assert [*ids[:first], ORIGINAL_IMAGE, *ids[first + 16 :]] == pair["input_ids"] == reference["input_ids"].tolist()
    assert np.array_equal(inputs["pixel_values"][0].numpy(), reference["pixel_values"])
    expected = torch.from_numpy(np.load(original / f"{name}.logits.npy"))
    assert logits.shape == expected.shape == (pair["len_logits"], 2000)
    assert (logits - expected).abs().max() < 1e-4
    model = LlavaForConditionalGeneration.from_pretrained(out)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert generated.tolist() == pair["greedy_12"][1:]
    text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pair["question"]}]}]
    processor = AutoProcessor.from_pretrained(out)
    assert processor.apply_chat_template(text, add_generation_prompt=True) == pair["prompt"]


def test_export_of_the_import_is_the_original_again(original: Path, tmp_path: Path) -> None:
    imported = import_llava(ImportSettings(original / "ckpt_full", out=tmp_path / "imported"))
    out = export_llava(ExportSettings(imported, out=tmp_path / "exported"))
    keys = json.loads((original / "keys_original.json").read_text())
    assert {key: list(value.shape) for key, value in weights(out).items()} == keys
    assert_equal(weights(out), weights(original / "ckpt_full"))
    assert_equal(weights(out / "vision_tower"), weights(original / "clip_tower"))
    found, expected = (json.loads((folder / "config.json").read_text()) for folder in (out, original / "ckpt_full"))
    left_out = {"pretraining_tp", "mm_projector_lr", "mm_vision_tower"}
    assert {key: found[key] for key in expected.keys() - left_out} == {key: expected[key] for key in expected.keys() - left_out}
    assert Path(found["mm_vision_tower"]) == out / "vision_tower"
    again = import_llava(ImportSettings(out, out=tmp_path / "again"))
    assert_equal(weights(again), weights(imported))
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "processor_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (imported / name).read_bytes(), name


def test_projector_of_the_pretraining_stage_goes_in_and_out(original: Path, tmp_path: Path) -> None:
    imported = import_llava(ImportSettings(original / "ckpt_full", out=tmp_path / "imported"))
    stage1 = import_llava(ImportSettings(original / "mm_projector.bin", out=tmp_path / "stage1", model_base=imported))
    LlavaForConditionalGeneration.from_pretrained(stage1)
    expected = read_tensors(original / "mm_projector.bin")
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        for part in ("weight", "bias"):
            found = weights(stage1)[f"multi_modal_projector.{layer}.{part}"]
            assert torch.equal(found, expected[f"model.mm_projector.{number}.{part}"].to(found.dtype))
    out = export_llava(ExportSettings(stage1, out=tmp_path / "projector", part="projector"))
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "mm_projector.bin"]
    assert_equal(torch.load(out / "mm_projector.bin", weights_only=True), expected)
    assert json.loads((out / "config.json").read_text())["mm_projector_type"] == "mlp2x_gelu"


def test_training_ids_equal_the_original_tokenizers(shared: Path) -> None:
    """Over several turns, too, where `legacy: false` puts no space after `</s>`; and the labels cover the same answers."""
    folder = shared / "fixtures" / "llava_masks"
    rows = {row["id"]: row for row in json.loads((folder / "conversations.json").read_text())}
    compared = 0
    for legacy in ("true", "false"):
        file = folder / f"tok_slow_legacy_{legacy}" / "tokenizer.model"
        tokenizer = llama_tokenizer(file, legacy == "true", "<image>", rows=2000)
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        encoder = ConversationEncoder(tokenizer, load_template("vicuna_v1"), "vicuna_v1", "<image>", 1, 100_000)
        reference = json.loads((folder / f"out_v1_slow_legacy_{legacy}.json").read_text())["results"]
        for name, expected in reference.items():
            masked_wholly = not any(label != IGNORED_LABEL for label in expected.get("labels") or [])
            if masked_wholly or len(expected["input_ids"]) >= 512:  # what the original drops or cuts is another test's matter
                continue
            try:
                tokens = encoder.encode(parse_row(rows[name], Path("images")).messages)
            except SampleFault:
                continue
            assert [ORIGINAL_IMAGE if i == image_id else i for i in tokens.input_ids] == expected["input_ids"], (legacy, name)
            assert tokens.labels == expected["labels"], (legacy, name)
            compared += 1
    assert compared == 24


def test_tokenizer_equals_sentencepiece_on_any_text(shared: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = shared / "fixtures" / "llava_ckpt" / "ckpt_full" / "tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(str(file))
    tokenizer = llama_tokenizer(file, True, "<image>", rows=2000)
    characters = [*"aeiou tnrsl  ABC012.,!?\n\t'", "é", "漢", "😀", "▁", "\x00", "ß"]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(characters, k=draw.randrange(1, 40)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids), text
