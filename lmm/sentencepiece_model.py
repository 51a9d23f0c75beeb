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
from lift.common.files import require_file

SPACE = "▁"
BPE_MODEL = 2
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
# Bytes that no UTF-8 text contains (RFC 3629, section 3), so that their pieces stand for nothing.
NEVER_IN_UTF8 = [f"<0x{byte:02X}>" for byte in (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)]


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
        raise UserError(f"{file}: expected a SentencePiece BPE model with byte fallback, as Llama's; this one is of another kind.")
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


def llama_tokenizer(file: Path, legacy: bool, image_token: str, rows: int, added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
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
        vocabulary[image_token] = vocabulary.pop(NEVER_IN_UTF8[0])
    names = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    tokenizer = Tokenizer(BPE(vocabulary, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix: Any = normalizers.Prepend(SPACE)
    if not legacy:
        # These tokens are then looked for after this step, in the text as a whole, so that no space is added after them.
        names_at_start = "|".join(map(re.escape, [*names, *added]))
        prefix = normalizers.Replace(Regex(rf"\A(?!{names_at_start})"), SPACE)
    tokenizer.normalizer = normalizers.Sequence([prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=not legacy, special=True) for name in [*names, *added]])
    tokenizer.add_special_tokens([AddedToken(image_token, normalized=False, special=True)])
    begin, end = names[1:3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, vocabulary[begin])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token=unknown, extra_special_tokens=[image_token]
    )
