"""Official checkpoints in and out: values of the official code, keys, refusals, and the folder's form on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_official import DIM, GRID, HEADS, LAYERS, PATCH, WIDTH, clip_state, lift_state, run_import, save
from torch import Tensor, nn
from torch.nn import functional as F

from lift.common.errors import UserError
from lift.encoder import load_encoder
from lift.export import export
from lift.model import mean_patch_feature
from lift.official import read_checkpoint
from lift.settings import ExportSettings, TextEncoderSettings


def plain_tower(state: dict[str, Tensor], prefix: str, layers: int, heads: int, mask: Tensor | None, x_BLW: Tensor) -> Tensor:
    """The residual blocks by torch's own pre-norm encoder layer, which keeps q, k and v stacked as the official code does."""
    names = {"self_attn.in_proj_weight": "attn.in_proj_weight", "self_attn.in_proj_bias": "attn.in_proj_bias"}
    for ours, theirs in (("self_attn.out_proj", "attn.out_proj"), ("linear1", "mlp.c_fc"), ("linear2", "mlp.c_proj")):
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    names |= {f"norm{i}.{kind}": f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    width = x_BLW.shape[-1]
    for i in range(layers):
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True).train()
        layer.load_state_dict({ours: state[f"{prefix}resblocks.{i}.{theirs}"] for ours, theirs in names.items()})
        x_BLW = layer(x_BLW, src_mask=mask)
    return x_BLW


def plain_image_tokens(state: dict[str, Tensor], pixels_B3HW: Tensor) -> Tensor:
    patches_BLW = F.conv2d(pixels_B3HW, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    tokens_BLW = torch.cat([state["visual.class_embedding"].expand(len(pixels_B3HW), 1, -1), patches_BLW], dim=1)
    tokens_BLW = tokens_BLW + state["visual.positional_embedding"]
    tokens_BLW = F.layer_norm(tokens_BLW, (WIDTH,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    tokens_BLW = plain_tower(state, "visual.transformer.", LAYERS, HEADS, None, tokens_BLW)
    return F.layer_norm(tokens_BLW, (WIDTH,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])


@pytest.fixture
def official(shared: Path) -> Path:
    return shared / "fixtures" / "official_lift_tiny"


def import_fixture(official: Path, out: Path) -> Path:
    return run_import(official / "epoch_1.pt", out, model_config=official / "LIFT-tiny.json")


def test_official_checkpoint_gives_the_official_values_from_image_files(official: Path, tmp_path: Path) -> None:
    """The reference values came from float32 pixels of these files; the stored pixels are rounded to float16."""
    from PIL import Image

    encoder = load_encoder(import_fixture(official, tmp_path / "encoder"))
    names = json.loads((official / "images" / "order.json").read_text())
    images = [Image.open(official / "images" / f"{name}.png") for name in names]
    pixels_B3HW = torch.stack([encoder.pixel_values(image, "official") for image in images])
    stored_B3HW = np.load(official / "images" / "eval_preprocessed_fp16.npy")
    assert np.array_equal(pixels_B3HW.numpy().astype(np.float16), stored_B3HW)
    embeddings_BD = encoder.image_embeddings(pixels_B3HW)
    with torch.no_grad():
        pooled_BW = mean_patch_feature(encoder.vision, pixels_B3HW)
    for found, name in ((pooled_BW, "pooled"), (embeddings_BD, "emb"), (F.normalize(embeddings_BD, dim=-1), "emb_norm")):
        np.testing.assert_allclose(found.numpy(), np.load(official / f"{name}.npy"), atol=1e-5, rtol=0, err_msg=name)
    from_stored_BD = F.normalize(encoder.image_embeddings(torch.from_numpy(stored_B3HW).float()), dim=-1)
    np.testing.assert_allclose(from_stored_BD, np.load(official / "emb_norm.npy"), atol=1e-4, rtol=0)
    standard_B3HW = torch.stack([encoder.pixel_values(image) for image in images])
    off = (F.normalize(encoder.image_embeddings(standard_B3HW), dim=-1).numpy() - np.load(official / "emb_norm.npy")).max()
    assert off > 1e-3  # the training preprocessing is another one


def test_export_writes_the_official_keys_and_values(official: Path, tmp_path: Path) -> None:
    folder = import_fixture(official, tmp_path / "encoder")
    export(ExportSettings(run=folder, out=tmp_path / "back.pt", format="official"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert (back["epoch"], back["name"]) == (1, "lift_tiny_fixture")
    reference = read_checkpoint(official / "epoch_1.pt").state
    assert list(back["state_dict"]) == [f"module.{name}" for name in reference]
    for name, tensor in reference.items():
        assert back["state_dict"][f"module.{name}"].shape == tensor.shape
        assert torch.equal(back["state_dict"][f"module.{name}"], tensor), name


@pytest.mark.parametrize("form", ["training", "bare", "safetensors", "text_decoder", "cosine"])
def test_every_form_of_file_gives_the_same_embeddings(tmp_path: Path, form: str) -> None:
    state = lift_state()
    path = tmp_path / "checkpoint.pt"
    if form == "training":
        save(path, state, optimizer={"lr": np.float64(1e-3), "exp_avg": torch.zeros(2)})
    elif form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "text_decoder":
        save(path, {name.replace("mlp_projector", "text_decoder"): tensor for name, tensor in state.items()})
    else:
        torch.save({name: t for name, t in state.items() if form == "bare" or name != "logit_scale"}, path)
    encoder = load_encoder(run_import(path, tmp_path / "encoder"))
    assert encoder.config["objective"] == ("cosine" if form == "cosine" else "contrastive")
    pixels_B3HW = torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    pooled_BW = plain_image_tokens(state, pixels_B3HW)[:, 1:].mean(1)
    head = [state[f"mlp_projector.projector.{i}.{kind}"] for i in (0, 2) for kind in ("weight", "bias")]
    expected_BD = F.linear(F.gelu(F.linear(pooled_BW, head[0], head[1])), head[2], head[3])
    found_BD = F.normalize(encoder.image_embeddings(pixels_B3HW), dim=-1)
    torch.testing.assert_close(found_BD, F.normalize(expected_BD, dim=-1).detach(), atol=1e-5, rtol=0)
    export(ExportSettings(run=tmp_path / "encoder", out=tmp_path / "back.pt", format="official"))
    again = load_encoder(run_import(tmp_path / "back.pt", tmp_path / "again"))
    assert torch.equal(again.image_embeddings(pixels_B3HW), encoder.image_embeddings(pixels_B3HW))
    assert ("module.logit_scale" in torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]) == (form != "cosine")


def tokenizer_folder(folder: Path) -> tuple[Path, int]:
    """A byte-level tokenizer whose end token has the largest id, as CLIP's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<start>", "<end>"]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = [(token, vocabulary.index(token)) for token in ("<start>", "<end>")]
    bpe.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<start>", eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)
    return folder, len(vocabulary)


def test_clip_baseline_gives_the_features_of_a_plain_formulation(tmp_path: Path) -> None:
    tokenizer, vocabulary = tokenizer_folder(tmp_path / "tokenizer")
    state = clip_state(vocabulary)
    path = save(tmp_path / "clip.pt", state)
    encoder = load_encoder(run_import(path, tmp_path / "encoder", tokenizer=tokenizer))
    pixels_B3HW = torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    image_BD = plain_image_tokens(state, pixels_B3HW)[:, 0] @ state["visual.proj"]
    found_BD = F.normalize(encoder.image_embeddings(pixels_B3HW), dim=-1)
    torch.testing.assert_close(found_BD, F.normalize(image_BD, dim=-1).detach(), atol=1e-5, rtol=0)
    texts = ["a b", "cde", "longer than the context of twelve"]
    _, side = encoder._text_tower
    for text, found_D in zip(texts, encoder.encode_texts(texts), strict=True):
        ids_1L = side.tokenise([text])["input_ids"]
        length = ids_1L.shape[1]
        tokens_1LW = state["token_embedding.weight"][ids_1L] + state["positional_embedding"][:length]
        causal_LL = nn.Transformer.generate_square_subsequent_mask(length)
        tokens_1LW = plain_tower(state, "transformer.", 1, 1, causal_LL, tokens_1LW)
        tokens_1LW = F.layer_norm(tokens_1LW, (64,), state["ln_final.weight"], state["ln_final.bias"])
        feature_D = tokens_1LW[0, ids_1L[0].argmax()] @ state["text_projection"]
        np.testing.assert_allclose(found_D, F.normalize(feature_D, dim=-1).detach(), atol=1e-5)
    export(ExportSettings(run=tmp_path / "encoder", out=tmp_path / "back.pt", format="official"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    assert {name.removeprefix("module.") for name in back} == state.keys()
    assert all(torch.equal(back[f"module.{name}"], tensor) for name, tensor in state.items())
    images_only = load_encoder(run_import(path, tmp_path / "images_only"))
    assert torch.equal(images_only.image_embeddings(pixels_B3HW), encoder.image_embeddings(pixels_B3HW))
    with pytest.raises(UserError, match="--tokenizer FOLDER"):
        images_only.encode_texts(["a"])


def test_folder_without_its_text_encoder_embeds_images_and_says_what_to_give(tmp_path: Path) -> None:
    from tiny import noise_image

    encoder = load_encoder(run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "encoder"))
    assert encoder.encode_images([noise_image(0)]).shape == (1, DIM)
    with pytest.raises(UserError, match=r"--text_encoder\.path.*NV-Embed-v2"):
        encoder.encode_texts(["a"])


def test_text_encoder_is_recorded_and_used_and_one_of_another_dimension_is_refused(tmp_path: Path, tiny_llm: Path) -> None:
    text = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
    state = lift_state()
    small = load_encoder(run_import(save(tmp_path / "small.pt", state), tmp_path / "small", text_encoder=text))
    with pytest.raises(UserError, match=r"24 dimensions.*has 32"):
        small.encode_texts(["a"])
    for i, shape in ((0, (32, WIDTH)), (2, (32, 32))):
        state |= {f"mlp_projector.projector.{i}.weight": torch.ones(shape), f"mlp_projector.projector.{i}.bias": torch.ones(32)}
    encoder = load_encoder(run_import(save(tmp_path / "c.pt", state), tmp_path / "encoder", text_encoder=text))
    assert encoder.config["text"]["kind"] == "causal_lm"
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_texts(["a", "b"]), axis=1), 1, atol=1e-6)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "evil.pt", lift_state(), scaler=Evil())
    with pytest.raises(UserError, match=r"evil\.pt: cannot be read as plain weights"):
        read_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pt", lift_state()).read_bytes()
    for name, content in {
        "cut.pt": whole[: len(whole) // 2],
        "other.pt": b"hello" * 99,
        "empty.pt": b"",
        "a.safetensors": b"hi",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be read as plain weights"):
            read_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: expected a state dict of tensors"):
        read_checkpoint(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.ln_post.bias"), "1 tensors are missing, the first is 'visual.ln_post.bias'"),
        (lambda s: s.pop("mlp_projector.projector.2.weight"), "missing, the first is 'mlp_projector.projector.2.weight'"),
        (lambda s: s.update({"visual.attn_pool.query": torch.ones(2)}), "'visual.attn_pool.query' .* is no part of"),
        (lambda s: s.update({"visual.ln_pre.bias": torch.ones(3)}), r"'visual.ln_pre.bias' has shape \[3\]"),
        (lambda s: s.update({"visual.positional_embedding": torch.ones(4, WIDTH)}), "has 4 rows; expected a class token"),
        (lambda s: s.update({"visual.ln_pre.bias": torch.full((WIDTH,), torch.nan)}), "'visual.ln_pre.bias' is not finite"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("mlp_")], "expected an official LIFT model"),
        (
            lambda s: [s.pop(k) for k in list(s) if "resblocks" in k],
            "first is 'visual.transformer.resblocks.0.attn.in_proj_bias'",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    state = lift_state()
    change(state)
    with pytest.raises(UserError, match=message):
        run_import(save(tmp_path / "c.pt", state), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"pool_type": "avg", "layers": 3}, "'vision_cfg.layers' is 3, but the checkpoint needs 2"),
        ({}, "'vision_cfg.pool_type' is 'tok', but the checkpoint needs 'avg'"),
        ({"pool_type": "avg", "no_ln_pre": True}, "'vision_cfg.no_ln_pre' is True"),
        ({"pool_type": "avg", "head_width": "64"}, "'vision_cfg.head_width' is '64'; expected a positive whole number"),
        ({"pool_type": "avg", "head_width": 48}, "does not split into attention heads of 48"),
    ],
)
def test_model_configuration_that_does_not_fit_is_refused(tmp_path: Path, vision: dict, message: str) -> None:
    config = tmp_path / "model.json"
    config.write_text(json.dumps({"embed_dim": 0, "vision_cfg": vision, "text_cfg": {}}))
    with pytest.raises(UserError, match=message):
        run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "encoder", model_config=config)


def test_head_width_comes_from_the_configuration_and_is_named_when_ignored_tensors_are(tmp_path: Path) -> None:
    config = tmp_path / "model.json"
    config.write_text(json.dumps({"vision_cfg": {"head_width": 32, "pool_type": "avg", "patch_dropout": 0.5}}))
    path = save(tmp_path / "c.pt", lift_state() | {"logit_bias": torch.tensor(-10.0)})
    encoder = load_encoder(run_import(path, tmp_path / "encoder", model_config=config))
    assert encoder.vision.config.num_attention_heads == WIDTH // 32
    assert encoder.config["imported"]["ignored"] == ["logit_bias"]


def test_folder_has_the_form_that_transformers_4_37_and_the_original_llava_read(tmp_path: Path) -> None:
    """Tried with transformers 4.37.2: pixel values identical to 5.x, hidden states equal to 1e-6. Each line here is needed."""
    folder = run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "encoder")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # refused without
        assert all(name.startswith("vision_model.") for name in file.keys())  # noqa: SIM118
        assert "vision_model.embeddings.class_embedding" in file.keys()  # noqa: SIM118
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "CLIPImageProcessor"
    side = GRID * PATCH
    assert processor["size"] == {"shortest_edge": side} and processor["crop_size"] == {"height": side, "width": side}
    assert processor["resample"] == 3 and processor["do_convert_rgb"] is True and "processor_class" not in processor
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["architectures"] == ["CLIPVisionModel"]
    assert isinstance(config["image_size"], int) and isinstance(config["patch_size"], int)
    assert "auto_map" not in config and "quantization_config" not in config
    lift_config = json.loads((folder / "lift_config.json").read_text())["preprocessing"]
    assert processor["image_mean"] == lift_config["training"]["mean"] != lift_config["official_evaluation"]["mean"]
