"""Tiny inputs that several rooms' tests build on; nothing here needs a network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import encoded, noise_image, write_tar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes of sources go to a folder of the test's own, not to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIFT_CACHE", str(folder))
    return folder


@pytest.fixture
def shared() -> Path:
    """The folder with real data and reference values that lies beside a developer's checkout."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine: real data and reference values are not part of the repository")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder of two webdataset tars in img2dataset's layout, 24 pairs with two captions each."""
    folder = tmp_path / "pairs"
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(12):
            key = f"{shard * 12 + i:09d}"
            captions = [f"picture number {key}", f"a noisy picture, {shard} {i}"]
            members[f"{key}.png"] = encoded(noise_image(shard * 12 + i))
            members[f"{key}.txt"] = captions[0].encode()
            members[f"{key}.json"] = json.dumps({"key": key, "caption": captions[0], "captions": captions}).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer causal LM of width 32 and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llm")
    special = ["<pad>", "<bos>", "<eos>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright (extra `dev`) drives the browser")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()
