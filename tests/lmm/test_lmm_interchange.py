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
from lmm.processor import set_aspect_ratio
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


def as_original(built: Path, folder: Path) -> Path:
    """A checkpoint of the original made from `built`, with its vision tower beside it and a name that is relative."""
    return export_llava(ExportSettings(built, out=folder / "original", mm_vision_tower="vision_tower"))


def changed(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json; None removes the key."""
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return target


@pytest.mark.parametrize("ratio", ["pad", "crop", "resize"])
def test_preprocessing_survives_the_round_trip(ratio: str, built: Path, tmp_path: Path) -> None:
    model = shutil.copytree(built, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(model, backend="pil")
    set_aspect_ratio(processor, ratio)
    processor.save_pretrained(model)
    back = import_llava(ImportSettings(as_original(model, tmp_path), out=tmp_path / "back"))
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    pixels = [
        AutoProcessor.from_pretrained(folder, backend="pil").image_processor(image, return_tensors="pt")["pixel_values"]
        for folder in (model, back)
    ]
    assert torch.equal(*pixels)


def test_round_trip_without_the_original(built: Path, tmp_path: Path) -> None:
    """Sharded pickles instead of one safetensors file make no difference; logits and processor stay the same."""
    out = as_original(built, tmp_path)
    tensors = weights(out)
    assert (
        "model.mm_projector.2.bias" in tensors and "model.vision_tower.vision_tower.vision_model.post_layernorm.bias" in tensors
    )
    assert all(key.startswith("vision_model.") for key in weights(out / "vision_tower"))
    load_tower(out / "vision_tower")
    keys = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": keys[::2], "pytorch_model-00002-of-00002.bin": keys[1::2]}
    for name, part in shards.items():
        torch.save({key: tensors[key] for key in part}, out / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    back = import_llava(ImportSettings(out, out=tmp_path / "back"))
    models = [LlavaForConditionalGeneration.from_pretrained(folder) for folder in (built, back)]
    processors = [AutoProcessor.from_pretrained(folder) for folder in (built, back)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    image = Image.new("RGB", (50, 40), (200, 0, 0))
    inputs = [processor(text="USER: <image>\nWhich?", images=image, return_tensors="pt") for processor in processors]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    with torch.no_grad():
        logits = [model(**own).logits for model, own in zip(models, inputs, strict=True)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("trained", [False, True])
def test_linear_projector_and_an_unfrozen_tower(trained: bool, built: Path, tmp_path: Path) -> None:
    out = as_original(built, tmp_path)
    changed(out, tmp_path / "linear", mm_projector_type="linear", unfreeze_mm_vision_tower=trained or None)
    tensors = {key: value for key, value in weights(out).items() if "mm_projector" not in key}
    generator = torch.Generator().manual_seed(0)
    tensors["model.mm_projector.weight"] = torch.randn(32, 16, generator=generator)
    tensors["model.mm_projector.bias"] = torch.randn(32, generator=generator)
    tower_key = "vision_model.post_layernorm.bias"
    tensors["model.vision_tower.vision_tower." + tower_key] += 1.0
    save_file(tensors, tmp_path / "linear" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "linear" / "model.safetensors.index.json").unlink(missing_ok=True)
    imported = import_llava(ImportSettings(tmp_path / "linear", out=tmp_path / "imported"))
    model = LlavaForConditionalGeneration.from_pretrained(imported)
    features = torch.randn(3, 16, generator=generator)
    expected = features @ tensors["model.mm_projector.weight"].T + tensors["model.mm_projector.bias"]
    with torch.no_grad():
        assert torch.allclose(model.model.multi_modal_projector(features), expected, atol=1e-5)
    # the original's loader takes the folder's tower, unless the checkpoint's own was trained
    own = tensors["model.vision_tower.vision_tower." + tower_key] - (0.0 if trained else 1.0)
    assert torch.equal(weights(imported)["vision_tower.post_layernorm.bias"], own)
    assert "different weights" in json.loads((imported / "build.json").read_text())["notes"][-1]
    again = export_llava(ExportSettings(imported, out=tmp_path / "again"))
    assert json.loads((again / "config.json").read_text())["mm_projector_type"] == "linear"
    for part in ("weight", "bias"):
        assert torch.equal(weights(again)[f"model.mm_projector.{part}"], tensors[f"model.mm_projector.{part}"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: expected 'mlp2x_gelu', 'linear', found 'mlp3x_gelu'"),
        ({"mm_projector_type": "linear"}, "of a projector of type linear, found"),
        ({"model_type": "llava_mpt"}, "model_type: expected 'llava_llama', 'llava', found 'llava_mpt'"),
        ({"mm_vision_tower": "somewhere/clip-large"}, "'somewhere/clip-large' is not at hand.*--vision_tower DIR"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio.*'anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end.*True"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer: expected a whole number"),
        ({"hidden_size": 48}, "expected shape"),
        ({"num_hidden_layers": 3}, r"layers\.2\..*no such weight"),
    ],
)
def test_other_checkpoints_are_refused(config: dict[str, Any], message: str, built: Path, tmp_path: Path) -> None:
    source = changed(as_original(built, tmp_path), tmp_path / "changed", **config)
    with pytest.raises(UserError, match=message):
        import_llava(ImportSettings(source, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the checkpoint ran')",))


def _without_projector(folder: Path) -> None:
    kept = {key: value for key, value in weights(folder).items() if "mm_projector.2" not in key}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _with_code(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": RunsCode()}))


def _without_a_shard(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def _cut_off(folder: Path) -> None:
    file = next(folder.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def _without_weights(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


def _with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a SentencePiece model")


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _without_tower_weights(folder: Path) -> None:
    (folder / "vision_tower" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_projector, "found 0.bias, 0.weight"),
        (_with_code, "would run code"),
        (_without_a_shard, "the shard that"),
        (_cut_off, "perhaps cut off"),
        (_without_weights, "model.safetensors or pytorch_model.bin"),
        (_with_a_broken_tokenizer, "tokenizer.model: expected a SentencePiece model"),
        (_without_tokenizer, "tokenizer.model or tokenizer.json, found neither"),
        (_without_tower_weights, "vision tower"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_damaged_checkpoints_are_refused(damage: Any, message: str, built: Path, tmp_path: Path) -> None:
    source = as_original(built, tmp_path)
    damage(source)
    with pytest.raises(UserError, match=message):
        import_llava(ImportSettings(source, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_projectors_are_refused(built: Path, tower: Path, llm: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of transformers already"):
        import_llava(ImportSettings(built, out=tmp_path / "out"))
    with pytest.raises(UserError, match="found nothing"):
        import_llava(ImportSettings(tmp_path / "none", out=tmp_path / "out"))
    with pytest.raises(UserError, match="expected a LLaVA folder with weights"):
        export_llava(ExportSettings(llm, out=tmp_path / "out"))
    with pytest.raises(UserError, match="exists already"):
        export_llava(ExportSettings(built, out=tower))
    lacking = shutil.copytree(built, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    weights.pop("vision_tower.embeddings.class_embedding")
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing, such as vision_tower.embeddings.class_embedding"):
        export_llava(ExportSettings(lacking, out=tmp_path / "out"))
    projector = export_llava(ExportSettings(built, out=tmp_path / "projector", part="projector"))
    with pytest.raises(UserError, match="--model_base DIR"):
        import_llava(ImportSettings(projector, out=tmp_path / "out"))
    other = torch.load(projector / "mm_projector.bin", weights_only=True)
    other["model.mm_projector.0.weight"] = torch.zeros(32, 24)
    torch.save(other, tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"expected shape \[32, 16\].*found \[32, 24\]"):
        import_llava(ImportSettings(tmp_path / "other.bin", out=tmp_path / "out", model_base=built))
    assert not (tmp_path / "out").exists()
    for key, value in (("projector_hidden_act", "gelu_pytorch_tanh"), ("vision_feature_layer", [-2, -5])):
        folder = changed(built, tmp_path / key, **{key: value})
        with pytest.raises(UserError, match=key):
            export_llava(ExportSettings(folder, out=tmp_path / "out"))
