"""NV-Embed-v2, the paper's text encoder, without its remote code: token ids in, unnormalised float32 embeddings out.

A Mistral decoder in which every token attends to every other (no causal mask, no sliding window), then latent attention: the
tokens query a table of trained latents, and their mean is the embedding (Lee et al., arXiv 2405.17428, section 3.1). Weights,
names and behaviour are those of the released `modeling_nvembed.py`, its quirks included.

Shapes: B captions, L tokens, D width, T pooled tokens of the whole batch, M latents, H heads, E width of a head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from lift.common.files import read_json
from lift.onednn import use_onednn
from lift.settings import TextEncoderSettings
from lift.text_encoders.batching import TextEncoder, Tokenised, pad, padding_mask, tokenise_texts

DECODER = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""What shapes the decoder, with the defaults of the reference's configuration class (transformers 4.42): config.json holds only
what differs from them. Its other keys do not change what is computed."""
LATENT_ATTENTION = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "cross_dim_head": 4096,
}


class NVEmbedEncoder(TextEncoder):
    """NV-Embed-v2 from a folder with its config, safetensors and tokenizer (beside them, or in `tokenizer/`).

    As the reference does, the end-of-sequence token is put after every caption as text, so it is cut off from a caption over
    max_length; BOS, caption and end token are pooled. Of a prompt of k tokens the first k positions are left out, BOS among
    them, so the prompt's last token is pooled unless the prompt ends in a space. Where that leaves nothing there is NaN.

    Raises:
        ValueError, KeyError, OSError, SafetensorError: the folder is not a whole NV-Embed model.
    """

    def __init__(self, folder: Path, settings: TextEncoderSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        config = read_json(folder / "config.json", "the configuration of an NV-Embed model")
        self.tokenizer, self.end = _tokenizer(folder)
        masked = config.get("is_mask_instruction", True) and config.get("padding_side", "right") == "right"
        self.prompt_length = len(self.tokenizer.tokenize(settings.prompt)) if masked and settings.prompt else 0
        self.model = load_nv_embed(folder, config, self.dtype, device)
        use_onednn(self.model)
        self.dimension = self.model.latent_attention_model.latents.shape[1]

    def tokenise(self, captions: list[str]) -> Tokenised:
        texts = [self.settings.prompt + caption + self.end for caption in captions]
        return tokenise_texts(self.tokenizer, texts, self.settings.max_length)

    def forward(self, rows: list[list[int]]) -> Tensor:
        mask_BL = padding_mask(rows)
        pooled_BL = mask_BL.clone()
        pooled_BL[:, : self.prompt_length] = False
        return self.model(pad(rows, 0).to(self.device), mask_BL.to(self.device), pooled_BL.to(self.device))


class NVEmbed(nn.Module):
    """The network; its state dict has the reference's keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embedding_model = MistralModel(_decoder_config(config))
        self.latent_attention_model = LatentAttention(LATENT_ATTENTION | (config.get("latent_attention_config") or {}))

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, pooled_BL: Tensor) -> Tensor:
        """float32 [B, D] of ids int64 [B, L]; `mask_BL` is False on padding, `pooled_BL` True on the tokens to average."""
        # transformers takes a four-dimensional mask as it is, and builds a causal one in every other case
        attend_B1LL = mask_BL[:, None, None, :].expand(-1, 1, mask_BL.shape[1], -1)
        hidden_BLD = self.embedding_model(input_ids=ids_BL, attention_mask=attend_B1LL, use_cache=False).last_hidden_state
        # A token's latent attention needs no other token: padding and prompt are left out of it.
        latent_TD = self.latent_attention_model(hidden_BLD[pooled_BL])
        latent_BLD = torch.zeros(hidden_BLD.shape, dtype=torch.float32, device=hidden_BLD.device)
        latent_BLD[pooled_BL] = latent_TD.float()
        return latent_BLD.sum(1) / pooled_BL.sum(1, keepdim=True)


class LatentAttention(nn.Module):
    """[T, D] to [T, D]: cross-attention of tokens over the latents, then a GEGLU feed-forward, each pre-norm with residual."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = int(config["latent_dim"])
        if config["hidden_dim"] != width:
            raise ValueError(f"expected hidden_dim {width} as latent_dim in config.json, found {config['hidden_dim']}")
        attention = _CrossAttention(width, int(config["num_cross_heads"]), int(config["cross_dim_head"]))
        self.latents = nn.Parameter(torch.empty(int(config["num_latents_value"]), width))
        self.cross_attend_blocks = nn.ModuleList([_PreNorm(attention, width, width), _PreNorm(_FeedForward(width), width)])

    def forward(self, hidden_TD: Tensor) -> Tensor:
        attend, feed_forward = self.cross_attend_blocks
        hidden_TD = hidden_TD + attend(hidden_TD, self.latents)
        return hidden_TD + feed_forward(hidden_TD)


class _PreNorm(nn.Module):
    """Normalises what goes into a block, its context included where it has one."""

    def __init__(self, fn: nn.Module, width: int, context_width: int | None = None) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width) if context_width else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        return self.fn(x) if self.norm_context is None else self.fn(x, self.norm_context(context))


class _CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, hidden_TD: Tensor, latents_MD: Tensor) -> Tensor:
        q_HTE = self._split(self.to_q(hidden_TD))
        k_HME, v_HME = map(self._split, self.to_kv(latents_MD).chunk(2, dim=-1))
        out_HTE = F.scaled_dot_product_attention(q_HTE[None], k_HME[None], v_HME[None])[0]
        return self.to_out(out_HTE.transpose(0, 1).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # the reference's places 0 and 2; its activation between them has no weights
        self.net = nn.ModuleList([nn.Linear(width, 8 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, hidden_TD: Tensor) -> Tensor:
        value, gate = self.net[0](hidden_TD).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))


def load_nv_embed(folder: Path, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> NVEmbed:
    """The network with the folder's weights, of which no more than one tensor at a time is held in another precision.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
        OSError, SafetensorError: unreadable files.
    """
    with torch.device("meta"):
        model = NVEmbed(config)
    # the one part that is computed and not loaded
    model.embedding_model.rotary_emb = MistralRotaryEmbedding(model.embedding_model.config)
    expected = model.state_dict()
    weights = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                weights[name] = tensors.get_tensor(name).to(dtype)
    faults = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape},
    }
    if any(faults.values()):
        found = {fault: sorted(names)[:3] for fault, names in faults.items() if names}
        raise ValueError(f"weights do not fit config.json: {found}")
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False).to(device)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = sorted(set(read_json(index, "the index of the weights")["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index.name} names the file {name}, expected one in the same folder")
    return [folder / name for name in names]


def _decoder_config(config: dict[str, Any]) -> MistralConfig:
    shape: dict[str, Any] = DECODER | {key: value for key, value in config["text_config"].items() if key in DECODER}
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    decoder = MistralConfig(**shape, rope_parameters=rope, sliding_window=None, use_cache=False)
    decoder._attn_implementation = "sdpa"
    return decoder


def _tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer exactly as tokenizer.json has it, and the end-of-sequence token as text.

    The class that the folder declares (LlamaTokenizer) is rebuilt by transformers 5 with another treatment of leading spaces.
    """
    place = next((place for place in (folder, folder / "tokenizer") if (place / "tokenizer.json").is_file()), None)
    if place is None:
        raise ValueError("expected tokenizer.json in it or in its folder tokenizer")
    declared = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    end = declared["content"] if isinstance(declared, dict) else declared
    return PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), eos_token=end), end
