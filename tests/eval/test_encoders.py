"""`open_encoder`: features are those of transformers and open_clip called directly, hashes follow the weights, errors say what
is wrong. All models are tiny, random and made here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import noise_image, tiny_pretrain
from tiny_official import DIM, lift_state, run_import, save
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from eval.encoders import ImageTextEncoder, open_encoder
from lift.common.errors import UserError
from lift.official import official_evaluation_pixels
from lift.settings import ClipTextSettings
from lift.text_side import clip_tokenizer
from lift.train import pretrain

TEXTS = ["a red square", "a blue circle to the left of a very large green triangle", "squares", "a red square"]
TOWER = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 12


def tokenizer() -> PreTrainedTokenizerFast:
    made = clip_tokenizer(ClipTextSettings(vocabulary_size=300), TEXTS)
    assert isinstance(made, PreTrainedTokenizerFast)
    return made


def text_config(tokens: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return TOWER | {"hidden_size": 32, "vocab_size": len(tokens), "max_position_embeddings": CONTEXT} | ids


def clip_folder(folder: Path, image_size: int = 32, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokens = tokenizer()
    vision = TOWER | {"hidden_size": 32, "image_size": image_size, "patch_size": image_size // 4}
    config = CLIPConfig(text_config=text_config(tokens), vision_config=vision, projection_dim=24)
    model = CLIPModel(config)
    for parameter in model.parameters():  # the initial weights are so small that all features are much alike
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def siglip_folder(folder: Path, text_width: int = 32) -> Path:
    torch.manual_seed(0)
    tokens = tokenizer()
    text = text_config(tokens) | {"hidden_size": text_width, "projection_size": text_width}
    vision = TOWER | {"hidden_size": 32, "image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def siglip2_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = Siglip2Tokenizer(vocab={token: i for i, token in enumerate([*special, "▁", *"abcdefghijklmnopqrstuvwxyz"])})
    text = text_config(tokens) | {"projection_size": 32}
    vision = TOWER | {"hidden_size": 32, "num_patches": 16, "patch_size": 8}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def change_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def images() -> list[Image.Image]:
    return [noise_image(0, (70, 45)), noise_image(1, (33, 60)), noise_image(2, (32, 32))]


def embedded(encoder: ImageTextEncoder, given: list[Image.Image]) -> np.ndarray:
    """One at a time: SigLIP 2 resizes each to another shape, and a batch must give the same."""
    batch_ND = encoder.image_embeddings(torch.stack([encoder.pixel_values(image) for image in given])).cpu().numpy()
    single_ND = [encoder.image_embeddings(encoder.pixel_values(image)[None])[0].cpu().numpy() for image in given]
    np.testing.assert_allclose(batch_ND, np.stack(single_ND), atol=1e-5, rtol=1e-4)
    return batch_ND


@pytest.mark.parametrize(
    ("build", "processor_class", "model_class", "padding"),
    [
        (clip_folder, CLIPImageProcessorPil, CLIPModel, "longest"),
        (siglip_folder, SiglipImageProcessorPil, SiglipModel, "max_length"),
        (siglip2_folder, Siglip2ImageProcessorPil, Siglip2Model, "max_length"),
    ],
)
def test_features_are_those_of_transformers(
    build: Callable[[Path], Path], processor_class: Any, model_class: Any, padding: str, tmp_path: Path
) -> None:
    folder = build(tmp_path / "some model")
    encoder = open_encoder(str(folder))
    model, processor = model_class.from_pretrained(folder).eval(), processor_class.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=padding, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    if padding == "max_length":
        del ids["attention_mask"]
        assert ids["input_ids"].shape[1] == CONTEXT
    with torch.no_grad():
        image_ND = model.get_image_features(**processor(images=images(), return_tensors="pt")).pooler_output
        text_ND = model.get_text_features(**ids).pooler_output
    np.testing.assert_allclose(embedded(encoder, images()), image_ND, atol=1e-6)
    found_ND = encoder.text_embeddings(TEXTS)
    np.testing.assert_allclose(found_ND, text_ND, atol=1e-6)
    np.testing.assert_allclose(encoder.text_embeddings(TEXTS, batch_size=3), found_ND, atol=1e-6)
    assert found_ND.dtype == np.float32 and np.abs(found_ND[0] - found_ND[1]).max() > 1e-3
    assert encoder.align(found_ND) is found_ND
    assert encoder.text_embeddings([]).shape == (0, encoder.embedding_dim)
    assert (encoder.name, encoder.is_clip, encoder.has_frozen_text) == ("some model", True, False)
    assert encoder.embedding_dim == image_ND.shape[1]


def test_pixels_of_any_mode_and_from_several_threads(tmp_path: Path) -> None:
    encoder = open_encoder(str(clip_folder(tmp_path / "clip")))
    grey = noise_image(4).convert("L")
    rgba = noise_image(4).convert("RGBA")
    rgba.putalpha(90)
    palette = noise_image(4).quantize(16)
    for image in (grey, rgba, palette):
        pixels_3HW = encoder.pixel_values(image)
        assert pixels_3HW.shape == (3, 32, 32) and pixels_3HW.dtype == torch.float32
        assert torch.equal(pixels_3HW, encoder.pixel_values(image.convert("RGB")))
    many = [noise_image(seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for threaded, alone in zip(pool.map(encoder.pixel_values, many), map(encoder.pixel_values, many), strict=True):
            assert torch.equal(threaded, alone)


def test_official_pixels_are_for_models_of_224(tmp_path: Path) -> None:
    large = open_encoder(str(clip_folder(tmp_path / "large", image_size=224)))
    image = noise_image(1, (300, 260))
    assert torch.equal(large.pixel_values(image, "official"), official_evaluation_pixels(image))
    assert not torch.equal(large.pixel_values(image), large.pixel_values(image, "official"))
    with pytest.raises(UserError, match="crops 224 pixels, but this encoder sees 32"):
        open_encoder(str(clip_folder(tmp_path / "small"))).pixel_values(image, "official")


def test_hashes_follow_what_the_features_depend_on(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    hashes = [hashes_of(folder)]
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("a note")
    assert hashes_of(moved) == hashes[0]
    change_weight(folder, "vision_model.post_layernorm.weight")
    hashes.append(hashes_of(folder))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.5, 0.5, 0.5]}))
    hashes.append(hashes_of(folder))
    assert len({content for content, _ in hashes}) == 3 and len({text for _, text in hashes}) == 1
    change_weight(folder, "text_projection.weight")
    hashes.append(hashes_of(folder))
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + " ")
    hashes.append(hashes_of(folder))
    assert len({content for content, _ in hashes}) == 5 and len({text for _, text in hashes}) == 3


def hashes_of(folder: Path) -> tuple[str, str]:
    encoder = open_encoder(str(folder))
    return encoder.content_hash, encoder.text_hash


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if name != "visual_projection.weight"}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys.*visual_projection\.weight"):
        open_encoder(str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="expected a CLIPModel folder"):
        open_encoder(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected a CLIPModel folder"):
        open_encoder(str(folder))
    torch.save(weights, folder / "pytorch_model.bin")
    assert open_encoder(str(folder)).embedding_dim == 24


def test_old_checkpoints_with_position_ids_are_opened(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    before = hashes_of(folder)
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert hashes_of(folder) == before


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image features have 32 dimensions, its text features 24"):
        open_encoder(str(siglip_folder(tmp_path / "siglip", text_width=24)))
    clip = clip_folder(tmp_path / "clip")
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | {"eos_token_id": 7}}))
    with pytest.raises(UserError, match=r"taken at the token 7.*but its tokenizer ends texts with"):
        open_encoder(str(clip))
    (clip / "config.json").write_text(json.dumps(config))
    more = tokenizer()
    rows = len(more)
    more.add_tokens(["hexagon"])
    more.save_pretrained(clip)
    with pytest.raises(UserError, match=f"its tokenizer gives the token {rows}, its text tower has {rows}"):
        open_encoder(str(clip)).text_embeddings(["a hexagon"])
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"needs\s+preprocessor_config.json"):
        open_encoder(str(clip))
    encoder = open_encoder(str(clip_folder(tmp_path / "again")))
    with pytest.raises(UserError, match=r"expected text embeddings of 24 dimensions, found an array of shape \[3, 8\]"):
        encoder.align(np.zeros((3, 8), np.float32))


def test_names_that_are_no_encoder(tmp_path: Path) -> None:
    for name in ("no_such_folder", "../no/such/folder", "/no such folder"):
        with pytest.raises(UserError, match=r"no such folder.*transformers CLIP"):
            open_encoder(name)
    with pytest.raises(UserError, match="no such folder, and no model of that name can be fetched"):
        open_encoder("nobody/no-such-model")
    (tmp_path / "epoch_1.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"found a file.*lift import"):
        open_encoder(str(tmp_path / "epoch_1.pt"))
    with pytest.raises(UserError, match=r"neither lift_config.json nor config.json.*Accepted are"):
        open_encoder(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="Give open_clip:local-dir:"):
        open_encoder(str(tmp_path))
    (tmp_path / "config.yaml").write_text("out: x")
    with pytest.raises(UserError, match="a run folder without an encoder folder"):
        open_encoder(str(tmp_path))
    vision = CLIPVisionConfig(**TOWER, hidden_size=32, image_size=32, patch_size=8)
    CLIPVisionModel(vision).save_pretrained(tmp_path / "vision only clip")
    with pytest.raises(UserError, match=r"expected model_type clip, siglip, siglip2, found 'clip_vision_model'"):
        open_encoder(str(tmp_path / "vision only clip"))


@pytest.mark.parametrize("objective", ["contrastive", "clip"])
def test_encoder_of_ours_opens_by_run_and_by_folder(pairs: Path, tiny_llm: Path, tmp_path: Path, objective: str) -> None:
    from lift.encoder import load_encoder

    pretrain(tiny_pretrain(pairs, tiny_llm, tmp_path / "run", objective))
    encoder, direct = open_encoder(str(tmp_path / "run")), load_encoder(tmp_path / "run" / "encoder")
    assert (encoder.name, encoder.content_hash) == ("run", direct.content_hash)
    assert encoder.text_hash == open_encoder(str(tmp_path / "run" / "encoder")).text_hash
    assert (encoder.is_clip, encoder.has_frozen_text) == (objective == "clip", objective != "clip")
    text_NT = encoder.text_embeddings(TEXTS)
    aligned_ND = encoder.align(text_NT)
    aligned_ND = aligned_ND / np.linalg.norm(aligned_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(aligned_ND, direct.encode_texts(TEXTS), atol=1e-6)
    image_ND = embedded(encoder, images())
    assert image_ND.shape[1] == aligned_ND.shape[1] == encoder.embedding_dim
    normalised_ND = image_ND / np.linalg.norm(image_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(normalised_ND, direct.encode_images(images()), atol=1e-6)
    with pytest.raises(UserError, match=r"expected text embeddings of \d+ dimensions, found an array of shape \[2, 5\]"):
        encoder.align(np.zeros((2, 5), np.float32))


def test_text_hash_of_ours_is_of_the_text_side_alone(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """Two LIFT runs with the same frozen text encoder share their text embeddings, wherever that encoder lies."""
    other = Path(shutil.copytree(tiny_llm, tmp_path / "llm elsewhere"))
    pretrain(tiny_pretrain(pairs, tiny_llm, tmp_path / "a"))
    pretrain(tiny_pretrain(pairs, other, tmp_path / "b", "cosine"))
    first, second = open_encoder(str(tmp_path / "a")), open_encoder(str(tmp_path / "b"))
    assert first.text_hash == second.text_hash and first.content_hash != second.content_hash
    np.testing.assert_array_equal(first.text_embeddings(TEXTS), second.text_embeddings(TEXTS))
    description = tmp_path / "b" / "encoder" / "lift_config.json"
    config = json.loads(description.read_text())
    description.write_text(json.dumps(config | {"text": config["text"] | {"max_length": 5}}))
    assert open_encoder(str(tmp_path / "b")).text_hash != first.text_hash


def test_lift_encoder_without_its_text_encoder_embeds_images(tmp_path: Path) -> None:
    encoder = open_encoder(str(run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "imported")))
    assert embedded(encoder, images()).shape == (3, DIM)
    for use_text in (lambda: encoder.text_embeddings(["a"]), lambda: encoder.text_hash):
        with pytest.raises(UserError, match=r"--text_encoder\.path.*NV-Embed-v2"):
            use_text()


def open_clip_model(folder: Path, image_size: int = 32, **changes: Any) -> Path:
    """Registers the architecture `tiny` and writes its random weights to `tiny.pt`."""
    import open_clip

    vision = {"image_size": image_size, "layers": 2, "width": 32, "head_width": 16, "patch_size": image_size // 4}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    folder.mkdir(exist_ok=True)
    (folder / "tiny.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text} | changes))
    open_clip.add_model_config(folder / "tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def test_features_are_those_of_open_clip(tmp_path: Path) -> None:
    import open_clip

    weights = open_clip_model(tmp_path)
    encoder = open_encoder(f"open_clip:tiny:{weights}")
    model, _, transform = open_clip.create_model_and_transforms("tiny", str(weights))
    model.eval()
    tokens = open_clip.get_tokenizer("tiny")(TEXTS)
    with torch.no_grad():
        image_ND = model.encode_image(torch.stack([transform(image) for image in images()]))
        text_ND = model.encode_text(tokens)
    np.testing.assert_allclose(embedded(encoder, images()), image_ND, atol=1e-6)
    np.testing.assert_allclose(encoder.text_embeddings(TEXTS, batch_size=3), text_ND, atol=1e-6)
    assert (encoder.name, encoder.embedding_dim, encoder.has_frozen_text) == ("tiny tiny", 24, False)
    palette = noise_image(3, (80, 50)).quantize(16)
    assert torch.equal(encoder.pixel_values(palette), encoder.pixel_values(palette.convert("RGB")))


def test_open_clip_hashes_and_folder_with_its_own_description(tmp_path: Path) -> None:
    weights = open_clip_model(tmp_path)
    first = open_encoder(f"open_clip:tiny:{weights}")
    state = torch.load(weights, weights_only=True)
    described = {"model_cfg": json.loads((tmp_path / "tiny.json").read_text()), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    described_one = open_encoder(f"open_clip:local-dir:{tmp_path}")
    assert (described_one.name, described_one.text_hash) == (tmp_path.name, first.text_hash)
    assert described_one.content_hash != first.content_hash  # another mean
    state["visual.proj"][0, 0] += 1
    torch.save(state, weights)
    changed = open_encoder(f"open_clip:tiny:{weights}")
    assert changed.text_hash == first.text_hash and changed.content_hash != first.content_hash
    state["text_projection"][0, 0] += 1
    torch.save(state, weights)
    assert open_encoder(f"open_clip:tiny:{weights}").text_hash != first.text_hash


def test_open_clip_faults_are_named(tmp_path: Path) -> None:
    weights = open_clip_model(tmp_path)
    for name, message in (
        ("ViT-B-33:openai", "no architecture 'ViT-B-33'. Did you mean 'ViT-B-32'?"),
        ("ViT-B-32:laion2b_s34b_b79", "which is neither. Did you mean 'laion2b_s34b_b79k'?"),
        ("ViT-B-32", r"found none. It has the tags .*laion400m_e32"),
        (f"tiny:{tmp_path / 'other.pt'}", r"other\.pt', which is neither"),
        (f"local-dir:{tmp_path / 'nowhere'}", "cannot be opened: .*nowhere"),
        ("hf-hub:nobody/no-such-model", "cannot be opened: "),
    ):
        with pytest.raises(UserError, match=message):
            open_encoder(f"open_clip:{name}")
    state = torch.load(weights, weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if name != "ln_final.bias"}, weights)
    with pytest.raises(UserError, match=r"Missing key.*ln_final\.bias"):
        open_encoder(f"open_clip:tiny:{weights}")
    weights.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot be opened"):
        open_encoder(f"open_clip:tiny:{weights}")
    small = {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    with pytest.raises(UserError, match="its tokenizer gives the token 49407, its text tower has 100"):
        open_encoder(f"open_clip:tiny:{open_clip_model(tmp_path, text_cfg=small)}")


def test_untrusted_models_run_no_code_of_theirs(tmp_path: Path) -> None:
    weights = open_clip_model(tmp_path)
    torch.save(Evil(tmp_path / "ran"), weights)
    with pytest.raises(UserError, match="cannot be opened"):
        open_encoder(f"open_clip:tiny:{weights}")
    folder = clip_folder(tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        open_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
    asking = {"tokenizer_kwargs": {"trust_remote_code": True}, "hf_tokenizer_name": "somebody/tokenizer"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": asking, "vision_cfg": {}}}))
    with pytest.raises(UserError, match="asks for trust_remote_code, which is never given"):
        open_encoder(f"open_clip:local-dir:{tmp_path}")


class Evil:
    """Pickled, it makes a file when it is loaded without restriction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_quick_gelu_of_published_weights_is_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip itself warns and goes on with the wrong activation."""
    import open_clip
    from open_clip import pretrained

    weights = open_clip_model(tmp_path)
    plain = open_encoder(f"open_clip:tiny:{weights}")
    published = {"published": {"url": "", "file": str(weights), "quick_gelu": True, "mean": None, "std": None}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", published)
    quick = open_encoder("open_clip:tiny:published")
    model = open_clip.create_model("tiny", str(weights), force_quick_gelu=True).eval()
    with torch.no_grad():
        expected_ND = model.encode_text(open_clip.get_tokenizer("tiny")(TEXTS))
    np.testing.assert_allclose(quick.text_embeddings(TEXTS), expected_ND, atol=1e-6)
    assert np.abs(quick.text_embeddings(TEXTS) - plain.text_embeddings(TEXTS)).max() > 1e-5
    assert quick.name == "tiny published" and quick.text_hash != plain.text_hash


def test_open_clip_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install .*open_clip_torch>=3"):
        open_encoder("open_clip:ViT-B-32:openai")
