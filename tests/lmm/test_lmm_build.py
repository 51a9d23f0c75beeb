"""`lmm build`: what it joins, where the image token goes, and which folders it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_lmm import make_llm, make_tokenizer
from transformers import AutoModelForCausalLM, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lmm.build import build
from lmm.conversation import parse_row
from lmm.folders import tower_hash
from lmm.processor import load_tokenizer
from lmm.recipes import encoder_of_folder
from lmm.sentencepiece_model import read_pieces
from lmm.settings import BuildSettings
from lmm.unused_byte import NEVER_IN_UTF8


def test_parts_are_the_given_ones_and_the_prompt_forms_agree(tower: Path, llm: Path, tmp_path: Path) -> None:
    out = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "out"))
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.vision_feature_layer == -2
    assert model.config.projector_hidden_act == "gelu"
    for built, source in (
        (model.model.vision_tower, CLIPVisionModel.from_pretrained(tower)),
        (model.model.language_model, AutoModelForCausalLM.from_pretrained(llm).model),
    ):
        expected = source.state_dict()
        assert built.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in built.state_dict().items())
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(llm).lm_head.weight)

    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.padding_side == "left"
    as_text = [{"role": "user", "content": "<image>\nWhich colour?"}]
    as_parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    prompt = processor.tokenizer.apply_chat_template(as_text, tokenize=False, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhich colour? ASSISTANT:"
    assert processor.apply_chat_template(as_parts, add_generation_prompt=True) == prompt
    inputs = processor(text=prompt, images=Image.new("RGB", (50, 40)), return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert model(**inputs).logits.isfinite().all()


def test_same_seed_same_projector(tower: Path, llm: Path, tmp_path: Path) -> None:
    key = "multi_modal_projector.linear_1.weight"
    weights = [
        load_file(build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / name, seed=seed)) / "model.safetensors")[key]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("rows", "tied", "source"),
    [(264, False, "spare row"), (259, False, "a byte that no text contains"), (259, True, "a byte that no text contains")],
)
def test_image_token_takes_a_spare_row_or_an_unused_byte(
    rows: int, tied: bool, source: str, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer(with_image=False)
    tokenizer.pad_token = None
    llm = make_llm(tmp_path / "llm", tokenizer, rows=rows, tied=tied)
    out = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "out"))
    assert source in capsys.readouterr().out
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.image_token_id == (259 if rows > 259 else tokenizer.convert_tokens_to_ids("ÿ"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    before = AutoModelForCausalLM.from_pretrained(llm)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    built = AutoProcessor.from_pretrained(out).tokenizer
    assert built.pad_token == "<eos>"
    text = "Köln 漢字 😀 ÿ À"
    assert built(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert built("<image>")["input_ids"] == [model.config.image_token_id]
    ids = torch.tensor([built(text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).loss, before(ids, labels=ids).loss)


@pytest.mark.parametrize("known", [False, True])
def test_no_row_is_added_where_the_vocabulary_has_no_free_id(known: bool, tower: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(with_image=False)
    every_byte = [chr(byte) for byte in NEVER_IN_UTF8]  # as tokens in their own right
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"] if known else every_byte})
    llm = make_llm(tmp_path / "llm", tokenizer, rows=259)
    out = tmp_path / "out"
    found = "found it at 259" if known else "found no spare row and no token of a byte that no text contains"
    expected = rf"llm: expected an id for <image> among the 259 rows of the embedding matrix, {found}\..*embeddings\(260\)"
    with pytest.raises(UserError, match=expected):
        build(BuildSettings(vision_tower=tower, llm=llm, out=out))
    assert not out.exists()
    enlarged = AutoModelForCausalLM.from_pretrained(llm)  # as the message says
    enlarged.resize_token_embeddings(260)
    enlarged.save_pretrained(llm)
    build(BuildSettings(vision_tower=tower, llm=llm, out=out))
    assert AutoProcessor.from_pretrained(out).tokenizer("<image>")["input_ids"] == [259]


def test_missing_chat_template_is_an_error_that_says_how_to_give_one(tower: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", make_tokenizer(chat_template=None), rows=260)
    with pytest.raises(UserError, match="--chat_template vicuna_v1"):
        build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "out"))
    out = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "out", chat_template="vicuna_v1"))
    text = AutoProcessor.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert text.startswith("A chat between a curious user") and text.endswith("USER: Hi ASSISTANT:")


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("vision_model.encoder.layers.1.mlp.fc1.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_an_unknown_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"vision_model.extra": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def _with_other_crop(folder: Path) -> None:
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"crop_size": {"height": 48, "width": 48}}))


def _without_preprocessing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_weight, "lacks weights"),
        (_with_an_unknown_weight, "unknown weights"),
        (_with_other_shape, "misshapen weights"),
        (_with_other_crop, "crop_size 32"),
        (_without_preprocessing, "image preprocessing"),
        (_cut_off, "safetensors"),
        (shutil.rmtree, "no such file"),
    ],
)
def test_damaged_tower_is_refused(damage, message: str, tower: Path, llm: Path, tmp_path: Path) -> None:
    shutil.copytree(tower, tmp_path / "tower")
    damage(tmp_path / "tower")
    with pytest.raises(UserError, match=message):
        build(BuildSettings(vision_tower=tmp_path / "tower", llm=llm, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_llm_is_refused(tower: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="language model"):
        build(BuildSettings(vision_tower=tower, llm=tmp_path / "none", out=tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="tokenizer"):
        build(BuildSettings(vision_tower=tower, llm=tmp_path / "empty", out=tmp_path / "out"))


@pytest.mark.parametrize("legacy", ["true", "false"])
def test_llm_with_a_sentencepiece_model_alone_gives_the_ids_of_the_original_llava(
    legacy: str, tower: Path, shared: Path, tmp_path: Path
) -> None:
    fixture = shared / "fixtures" / "llava_masks"
    llm = make_llm(tmp_path / "llm", make_tokenizer(), rows=2000)
    for file in llm.glob("*token*"):
        file.unlink()
    (llm / "chat_template.jinja").unlink()
    for file in (fixture / f"tok_slow_legacy_{legacy}").iterdir():
        shutil.copy(file, llm)
    out = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "out", chat_template="vicuna_v1"))
    model = LlavaForConditionalGeneration.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == 2000  # a new row would change the text loss
    encoder = encoder_of_folder(out, "vicuna_v1", 1, 10_000)
    reference = json.loads((fixture / f"out_v1_slow_legacy_{legacy}.json").read_text())["results"]
    samples = {sample["id"]: sample for sample in json.loads((fixture / "conversations.json").read_text())}
    for name in ("img_only", "img_multi", "img_second_turn", "unicode", "whitespace", "text_multi", "answer_has_eos"):
        tokens = encoder.encode(parse_row(samples[name], tmp_path).messages)
        ids = [-200 if token == model.config.image_token_id else token for token in tokens.input_ids]
        assert ids == reference[name]["input_ids"], name


def test_what_lies_beside_a_sentencepiece_model(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "fixtures" / "llava_masks" / "tok_slow_legacy_true" / "tokenizer.model", tmp_path)
    size = len(read_pieces(tmp_path / "tokenizer.model"))
    options = {"eos_token": {"content": "<end>"}, "pad_token": "<unk>", "bos_token": "<not there>", "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options | {"model_max_length": 99}))
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": size + 1, "<start>": size}))
    tokenizer = load_tokenizer(tmp_path)
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<s>", "<end>", "<unk>", "<unk>")
    assert tokenizer.convert_tokens_to_ids(["<start>", "<end>"]) == [size, size + 1]
    assert tokenizer.convert_tokens_to_ids("<image>") < size  # config.json names no spare row
    assert (tokenizer.chat_template, tokenizer.model_max_length, tokenizer.padding_side) == ("new", 99, "left")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": size + 1}))
    with pytest.raises(UserError, match=f"expected ids from {size} without a gap"):
        load_tokenizer(tmp_path)


def test_code_in_a_model_folder_never_runs(tower: Path, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when someone answers transformers' question with yes."""
    hostile = shutil.copytree(llm, tmp_path / "hostile")
    (hostile / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((hostile / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (hostile / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="hostile: expected a"):
        build(BuildSettings(vision_tower=tower, llm=hostile, out=tmp_path / "out"))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_weights_cut_off_in_a_model_folder_are_named(tower: Path, llm: Path, tmp_path: Path) -> None:
    folder = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: is not whole"):
        tower_hash(folder)
