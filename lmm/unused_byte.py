"""A free token id in a full vocabulary: that of a byte which no UTF-8 text contains, so that no text is tokenised otherwise.

Vocabularies with byte fallback (Llama: `<0xFF>`) and byte-level ones (GPT-2, Qwen: `ÿ`) have a token for every byte, but the
bytes 0xC0, 0xC1 and 0xF5 to 0xFF do not occur in UTF-8 (RFC 3629, section 3). A new special token may take the id of one.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

NEVER_IN_UTF8 = (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)


def give_unused_byte(tokenizer: Any, token: str) -> bool:
    """Renames the token of an unused byte to `token` in a fast tokenizer, in place. False where the vocabulary has none.

    A byte that takes part in a merge, or is a token of its own right, counts as used.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        return False
    # In byte-level vocabularies these bytes stand for the characters of the same number.
    names = [f"<0x{byte:02X}>" if model.get("byte_fallback") else chr(byte) for byte in NEVER_IN_UTF8]
    if not model.get("byte_fallback") and "ByteLevel" not in json.dumps(backend["pre_tokenizer"]):
        return False
    added = {entry["content"] for entry in backend["added_tokens"]}
    merged = {part for merge in model["merges"] for part in (merge.split(" ") if isinstance(merge, str) else merge)}
    free = [name for name in names if name in model["vocab"] and name not in added | merged]
    if not free:
        return False
    model["vocab"][token] = model["vocab"].pop(free[0])
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(backend)).model
    return True
