"""A real LLaVA folder whose answer is known beforehand: its language model is a chain, in which each token names the next.

Embeddings are unit vectors, attention and MLP add nothing, and row `next` of the output matrix has a one at `token`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tiny_lmm import make_tokenizer, make_tower
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from lmm.build import build
from lmm.settings import BuildSettings

LAST_OF_PROMPT = ":"


def make_scripted_llava(folder: Path, pieces: list[str], ends: bool = True) -> Path:
    """A model that says `pieces` (each one token) to whatever prompt ends with ':', then stops, or starts over."""
    (folder / "tower").mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    chain = [LAST_OF_PROMPT, *pieces, "<eos>"] if ends else [LAST_OF_PROMPT, *pieces, pieces[0]]
    ids = tokenizer.convert_tokens_to_ids(chain)
    rows = len(tokenizer)
    width = rows + rows % 2
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(rows, width))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(ids):
            model.lm_head.weight[following, token] = 1
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    settings = BuildSettings(vision_tower=make_tower(folder / "tower"), llm=folder / "llm", out=folder / "llava")
    return build(settings)
