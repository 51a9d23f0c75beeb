"""Tokenizers of the original LLaVA: Llama's SentencePiece ones, with the ids that its code gives.

The original code cuts the text at each `<image>` and tokenises the pieces one by one, each as if it began a text; and it uses
the slow tokenizer, whose `legacy` flag decides what follows a special token. transformers 5 has only fast tokenizers and
rebuilds their normaliser, which changes some ids (text that starts with a space, text after a special token). Here both flags
are reproduced with a fast one, which knows the characters that each token stands for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from lift.common.errors import UserError
from lift.common.files import require_folder
from lmm.conversation import IMAGE_MARKER, ConversationEncoder
from lmm.sentencepiece_model import SPACE, llama_backend, optional_json, own_chat_template, read_pieces, token_text

IMAGE_PLACEHOLDER = -200
"""Stands for an image in the original's ids where the vocabulary has no token for it."""
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def is_llama_tokenizer(folder: Path) -> bool:
    """Whether the folder says so, or holds nothing but a SentencePiece model."""
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        return True
    return _config(folder).get("tokenizer_class") in LLAMA_CLASSES


def load_llama_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer, and whether each piece of text has to be given a space in front (`legacy: false`).

    Raises:
        UserError: the folder has neither tokenizer.json nor tokenizer.model, or they cannot be read.
    """
    config = _config(require_folder(folder, "a tokenizer's folder"))
    legacy = config.get("legacy") is not False
    try:
        backend = _backend(folder)
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception or RuntimeError for a damaged file
        raise UserError(f"{folder}: the tokenizer cannot be read: {error}. Fetch its files again.") from error
    spaces = normalizers.Replace(" ", SPACE)
    # before each run of text between special tokens for legacy: true; only where the caller puts it for legacy: false
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if legacy else spaces
    backend.pre_tokenizer = None
    names = {key: token_text(config.get(key)) or default for key, default in SPECIAL.items()}
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    if config.get("add_bos_token", True):
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = own_chat_template(folder)
    return tokenizer, not legacy


def _config(folder: Path) -> dict[str, Any]:
    return optional_json(folder / "tokenizer_config.json")


def _backend(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder}: expected a tokenizer (tokenizer.json or tokenizer.model), found neither. Check the path.")
    backend = llama_backend(read_pieces(folder / "tokenizer.model"))
    added = _config(folder).get("added_tokens_decoder", {})
    for token in sorted(added, key=int):
        values = {key: value for key, value in added[token].items() if key != "__type"}
        add = backend.add_special_tokens if values.get("special") else backend.add_tokens
        add([AddedToken(**values)])
    return backend


class PiecewiseEncoder(ConversationEncoder):
    """Tokenises the text between images piece by piece, as the original LLaVA does; an image is one placeholder id.

    Args:
        space_first: each piece is given a space in front, which SentencePiece adds to whatever it takes for a text.
    """

    def __init__(
        self, tokenizer: Any, template: str, template_name: str, tokens_per_image: int, max_length: int, space_first: bool
    ) -> None:
        super().__init__(tokenizer, template, template_name, IMAGE_MARKER, tokens_per_image, max_length)
        self.space_first = space_first
        self.image_id = tokenizer.get_vocab().get(IMAGE_MARKER, IMAGE_PLACEHOLDER)
        with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
        self.first = with_special[:1] if with_special[:1] == [tokenizer.bos_token_id] else []

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        input_ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        if not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)):
            input_ids, offsets = list(self.first), [(0, 0)] * len(self.first)
        start = 0
        for number, piece in enumerate(text.split(IMAGE_MARKER)):
            if number:
                input_ids.append(self.image_id)
                offsets.append((start, start + len(IMAGE_MARKER)))
                start += len(IMAGE_MARKER)
            ids, places = self._piece(piece)
            input_ids += ids
            offsets += [(start + begin, start + end) for begin, end in places]
            start += len(piece)
        return input_ids, offsets

    def _piece(self, piece: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not piece:
            return [], []
        added = int(self.space_first and not piece.startswith(tuple(self.tokenizer.all_special_tokens)))
        encoding = self.tokenizer(
            " " * added + piece,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        places = [(max(begin - added, 0), max(end - added, 0)) for begin, end in encoding["offset_mapping"]]
        return encoding["input_ids"], places
