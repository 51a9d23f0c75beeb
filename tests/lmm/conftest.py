"""Tiny models and data shared by the tests of `lmm`; how they are made stands in tests/tiny_lmm.py."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_lmm import COLOURS, conversation, make_llm, make_tokenizer, make_tower


@pytest.fixture(scope="module", autouse=True)
def process_is_left_as_it_was() -> Iterator[None]:
    """Training starts a process group, sets a launcher's variables and accelerate's state; other tests must not meet them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        importlib.import_module("deepspeed.comm.comm").cdb = None
        groups = importlib.import_module("deepspeed.utils.groups")
        for name in [name for name, value in vars(groups).items() if isinstance(value, torch.distributed.ProcessGroup)]:
            setattr(groups, name, None)  # DeepSpeed would go on with the group that no longer is


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm"), make_tokenizer(), rows=260)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/`, `caption.json` (12 samples), `chat.json` (12 samples, 4 of them text only, answers of unequal length)."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    captions, chats = [], []
    for number in range(12):
        colour = list(COLOURS)[number % 4]
        Image.new("RGB", (40 + 4 * number, 36), COLOURS[colour]).save(folder / "images" / f"{number}.png")
        captions.append(conversation(str(number), f"a {colour} picture", f"{number}.png"))
        image = f"{number}.png" if number % 3 else None
        chats.append(conversation(str(number), f"It is {colour}" + "." * number, image))
    (folder / "caption.json").write_text(json.dumps(captions))
    (folder / "chat.json").write_text(json.dumps(chats))
    return folder
