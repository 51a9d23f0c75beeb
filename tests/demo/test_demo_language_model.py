"""The demo's language model: its texts are read as its chat template writes them, and its training is deterministic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from demo.language_model import _spans, train_language_model
from demo.settings import LanguageModelSettings
from lift.common.errors import UserError
from lift.common.files import sha256_file

MESSAGES = [
    {"role": "user", "content": "What colour is the object? There are several options:\nA. red\nB. blue\n\nAnswer ."},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "B"},
]


def _texts(folder: Path) -> Path:
    rows = [{"text": f"a {colour} circle"} for colour in ("red", "blue")] * 24 + [{"messages": MESSAGES}] * 16
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _train(texts: Path, out: Path, epochs: int = 4) -> Path:
    train_language_model(
        LanguageModelSettings(texts=texts, out=out, width=32, layers=2, heads=2, epochs=epochs, learning_rate=3e-3)
    )
    return out


def test_it_learns_is_deterministic_and_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = _texts(tmp_path)
    first, second = _train(texts, tmp_path / "a", epochs=30), _train(texts, tmp_path / "b", epochs=30)
    assert sha256_file(first / "model.safetensors") == sha256_file(second / "model.safetensors")
    losses = [row["loss"] for row in json.loads((first / "training.json").read_text())["losses"]]
    assert losses[-1] < 0.3 * losses[0]
    written = (first / "training.json").stat().st_mtime_ns
    _train(texts, first, epochs=30)
    assert (first / "training.json").stat().st_mtime_ns == written
    assert "reused" in capsys.readouterr().out


def test_texts_read_as_the_chat_template_writes_them(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_train(_texts(tmp_path), tmp_path / "model", epochs=1))
    text = "".join(part for part, _ in _spans({"messages": MESSAGES}))
    assert text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("ASSISTANT:")
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part, _ in _spans({"messages": MESSAGES})]
    assert whole == [token for part in parts for token in part], "no token spans two parts"
    assert tokenizer.decode(parts[1]) == " A</s>" and len(parts[1]) == 2


def test_missing_and_empty_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl.*no such file"):
        _train(tmp_path / "none.jsonl", tmp_path / "model")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="expected texts, found none"):
        _train(tmp_path / "empty.jsonl", tmp_path / "model")
    assert not (tmp_path / "model").exists()
