"""A Llama tokenizer from its `tokenizer.model` alone, as the original LLaVA tokenises: one SentencePiece file in, a fast
tokenizer out. The file is a protocol buffer whose three needed fields are read here, so that no further package is needed.

The original cuts a prompt at its images and tokenises each part by itself, each with SentencePiece's leading space. So does
this tokenizer at the image token. After `</s>` it depends on the tokenizer's `legacy`: with false, no space is put there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import unpack
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lift.common.errors import UserError
from lift.common.files import read_json, require_file
from lmm.unused_byte import NEVER_IN_UTF8

SPACE = "▁"
BPE_MODEL = 2
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int
    """`Type` in sentencepiece_model.proto: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""


def read_pieces(file: Path) -> list[Piece]:
    """The vocabulary of a SentencePiece BPE model in order of its ids.

    Raises:
        UserError: no SentencePiece file, not BPE with byte fallback, or one that rewrites text before it is tokenised.
    """
    try:
        pieces, model_type, normaliser = _parse(require_file(file, "a SentencePiece model").read_bytes())
    except (IndexError, ValueError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{file}: expected a SentencePiece model, found another or a damaged file. Copy it again.") from error
    if not pieces or model_type != BPE_MODEL or sum(piece.kind == BYTE for piece in pieces) != 256:
        raise UserError(
            f"{file}: expected a SentencePiece BPE model with byte fallback, as Llama's; this one is of another kind."
        )
    kinds = [piece.kind for piece in pieces]
    if kinds.count(UNKNOWN) != 1 or kinds.count(CONTROL) != 2 or USER_DEFINED in kinds:
        raise UserError(f"{file}: expected the special tokens <unk>, <s> and </s> alone, as in Llama's, found others.")
    if normaliser.get("charsmap") or not normaliser["dummy_prefix"] or normaliser["remove_extra_whitespaces"]:
        raise UserError(
            f"{file}: expected Llama's SentencePiece settings (identity normaliser, dummy prefix, spaces kept), found others. "
            "Give the model a tokenizer.json made with transformers instead."
        )
    return pieces


def _parse(data: bytes) -> tuple[list[Piece], int, dict[str, Any]]:
    """ModelProto: pieces = 1, trainer_spec = 2 (model_type = 3), normalizer_spec = 3 (charsmap = 2, prefix = 3, spaces = 4)."""
    pieces: list[Piece] = []
    model_type = 1
    normaliser: dict[str, Any] = {"charsmap": b"", "dummy_prefix": True, "remove_extra_whitespaces": True}
    for field, value in _fields(data):
        if field == 1:
            inner = dict(_fields(value))
            pieces.append(Piece(inner[1].decode(), unpack("<f", inner[2])[0] if 2 in inner else 0.0, inner.get(3, 1)))
        elif field == 2:
            model_type = dict(_fields(value)).get(3, 1)
        elif field == 3:
            names = {2: "charsmap", 3: "dummy_prefix", 4: "remove_extra_whitespaces"}
            normaliser |= {names[number]: content for number, content in _fields(value) if number in names}
    return pieces, model_type, normaliser


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one protocol-buffer message: ints for varints, bytes for everything else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + size > len(data):
            raise ValueError("cut off")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while data[place] & 0x80:
        value |= (data[place] & 0x7F) << shift
        shift, place = shift + 7, place + 1
    return value | data[place] << shift, place + 1


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces; SentencePiece joins those with the best score first, the leftmost on a tie."""
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.kind not in (UNKNOWN, CONTROL, BYTE)}
    ranked = []
    for text, number in ids.items():
        splits = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [(ids[left], ids[right], left, right) for left, right in splits if left in ids and right in ids]
        ranked += [(-pieces[number].score, *pair) for pair in sorted(known)]
    return [(left, right) for _, _, _, left, right in sorted(ranked, key=lambda entry: entry[0])]


def llama_backend(pieces: list[Piece], vocabulary: dict[str, int] | None = None) -> Tokenizer:
    """SentencePiece's merges with byte fallback, and its decoder; what is done to a text before is the caller's.

    Args:
        vocabulary: ids of the tokens, where they are not those of `pieces` in their order.
    """
    vocabulary = vocabulary or {piece.text: number for number, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    backend = Tokenizer(BPE(vocabulary, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def llama_tokenizer(
    file: Path, legacy: bool, image_token: str, rows: int, added: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the ids of the slow LlamaTokenizer of transformers 4.37 on every part between images.

    Args:
        file: `tokenizer.model`.
        legacy: as in tokenizer_config.json; True puts a leading space after special tokens too.
        image_token: becomes one special token. Where the vocabulary lacks it, it takes a spare row, else the id of a byte that
            never occurs in text: either way the model's vocabulary stays as it is.
        rows: rows of the model's embedding matrix.
        added: further special tokens, in the order of their ids, which follow those of the file.
    """
    pieces = read_pieces(file)
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    if image_token not in vocabulary and image_token not in added and len(pieces) + len(added) >= rows:
        vocabulary[image_token] = vocabulary.pop(f"<0x{NEVER_IN_UTF8[0]:02X}>")
    names = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer = llama_backend(pieces, vocabulary)
    prefix: Any = normalizers.Prepend(SPACE)
    if not legacy:
        # These tokens are then looked for after this step, in the text as a whole, so that no space is added after them.
        names_at_start = "|".join(map(re.escape, [*names, *added]))
        prefix = normalizers.Replace(Regex(rf"\A(?!{names_at_start})"), SPACE)
    tokenizer.normalizer = normalizers.Sequence([prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=not legacy, special=True) for name in [*names, *added]])
    tokenizer.add_special_tokens([AddedToken(image_token, normalized=False, special=True)])
    begin, end = names[1:3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, vocabulary[begin])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token=names[0], extra_special_tokens=[image_token]
    )


def llama_tokenizer_of(folder: Path, image_token: str) -> Any:
    """`llama_tokenizer` of a folder with tokenizer.model and what its JSON files say of added tokens, roles and the template.

    Raises:
        UserError: the ids of the added tokens have a gap.
    """
    file, options = folder / "tokenizer.model", optional_json(folder / "tokenizer_config.json")
    first = len(read_pieces(file))
    listed = {int(number): entry["content"] for number, entry in options.get("added_tokens_decoder", {}).items()}
    listed |= {number: token for token, number in optional_json(folder / "added_tokens.json").items()}
    added = {number: token for number, token in sorted(listed.items()) if number >= first}
    if list(added) != list(range(first, first + len(added))):
        raise UserError(f"{folder}: added tokens: expected ids from {first} without a gap, found {list(added)}.")
    rows = optional_json(folder / "config.json").get("vocab_size", first + len(added))
    tokenizer: Any = llama_tokenizer(file, options.get("legacy") is not False, image_token, rows, list(added.values()))
    tokenizer.padding_side = "left"  # batched generation pads on the left
    for role in ("pad_token", "eos_token", "bos_token"):
        token = token_text(options.get(role))
        if token in tokenizer.get_vocab():
            setattr(tokenizer, role, token)
    tokenizer.chat_template = own_chat_template(folder)
    tokenizer.model_max_length = int(options.get("model_max_length") or tokenizer.model_max_length)
    return tokenizer


def optional_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    value = read_json(file) if file.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found a {type(value).__name__}.")
    return value


def token_text(token: Any) -> str | None:
    """Of a token as tokenizer_config.json names it: plain, or an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def own_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = optional_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
