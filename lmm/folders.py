"""Model folders on disk: what identifies their content, and whether transformers finds every weight in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lift.common.errors import UserError
from lift.common.files import sha256_file, sha256_text

# What decides how a model behaves; records of how it came to be do not.
CONTENT = ("*.safetensors", "*config.json", "*.jinja", "tokenizer*", "special_tokens_map.json")


def content_hash(folder: Path) -> str:
    """Hash of the weights, configuration, tokenizer and preprocessing of a model folder.

    Raises:
        UserError: the folder has no weights in safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: expected a model folder with *.safetensors, found none. Check the path.")
    files = sorted({file for pattern in CONTENT for file in folder.glob(pattern)})
    return sha256_text("\n".join(f"{file.name} {sha256_file(file)}" for file in files))


def check_loads(folder: Path) -> None:
    """Loads the finished model as a user would. Raises RuntimeError when a weight is missing, left over or misshapen."""
    from transformers import LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    info = loaded[1]
    if any(info.values()):
        raise RuntimeError(f"{folder}: the written model does not load whole: {info}")
