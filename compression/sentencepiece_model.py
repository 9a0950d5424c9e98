"""A SentencePiece tokenizer.model as GGUF metadata.

Format: sentencepiece_model.proto of github.com/google/sentencepiece, in
protobuf's wire format (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compression.tokenizer_from_gguf import fast_tokenizer
from compression.tokenizer_settings import (
    CONTROL,
    USER_DEFINED,
    named_tokens,
    read_json,
    special_ids,
    special_values,
)
from compression.tokenizer_spm import piece_metadata
from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import Value

_MODELS = {1: "t5", 2: "llama"}  # TrainerSpec.ModelType: UNIGRAM and BPE
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BOS, _EOS, _PAD = 41, 42, 43  # fields of TrainerSpec


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
        pieces: (text, score, type) of every id; the types are those of `gguf.TokenType`.
        model: GGUF's name for how pieces are chosen.
        special: Ids of bos, eos and padding.
        space_prefix: A space is put before a text.
        one_space: Runs of spaces become one.
    """

    pieces: tuple[tuple[str, float, int], ...]
    model: str
    special: dict[str, int]
    space_prefix: bool
    one_space: bool


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Parses a tokenizer.model.

    Raises:
        UserError: It is damaged, or of a kind that GGUF does not hold.
    """
    try:
        parts = list(_fields(file.read_bytes()))
        pieces = tuple(_piece(value) for field, value in parts if field == 1 and isinstance(value, bytes))
        trainer, normalizer = (
            dict(_fields(b"".join(v for f, v in parts if f == number and isinstance(v, bytes))))
            for number in (2, 3)
        )
        kind = trainer.get(3, 1)
        special = {
            name: _signed(trainer.get(field, default))
            for name, field, default in (("bos", _BOS, 1), ("eos", _EOS, 2), ("padding", _PAD, -1))
        }
    except (*MALFORMED, struct.error) as error:
        raise UserError(f"{file}: not a SentencePiece model ({error}); download it again") from error
    if not pieces:
        raise UserError(f"{file}: holds no SentencePiece pieces; download it again")
    if kind not in _MODELS:
        raise UserError(f"{file}: only BPE and Unigram models can be written to GGUF; use --no-export")
    if normalizer.get(2):
        raise UserError(f"{file}: its character map cannot be written to GGUF yet; use --no-export")
    return SentencePieceModel(
        pieces,
        _MODELS[int(kind)],
        {name: index for name, index in special.items() if 0 <= index < len(pieces)},
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def sentencepiece_metadata(folder: Path, vocabulary: int) -> dict[str, Value]:
    """Metadata of a folder's tokenizer.model, with the tokens its JSON files add.

    Args:
        folder: Checkpoint folder.
        vocabulary: Rows of the embedding.

    Raises:
        UserError: A damaged file, an id without a row, or llama.cpp gives other
            ids than the same pieces do in transformers.
    """
    file = folder / "tokenizer.model"
    model = read_sentencepiece(file)
    config = read_json(folder / "tokenizer_config.json")
    claims = [(text, index, kind) for index, (text, _, kind) in enumerate(model.pieces)]
    claims += [claim for claim in _added(folder, config) if claim[1] >= len(claims)]
    tokens, kinds = named_tokens(claims, vocabulary, file)
    lowest = min(score for _, score, _ in model.pieces) - 1
    scores = [score for _, score, _ in model.pieces] + [lowest] * (vocabulary - len(model.pieces))
    metadata = piece_metadata(
        tokens, kinds, scores, model=model.model, space_prefix=model.space_prefix, one_space=model.one_space
    )
    ids = {**model.special, **special_ids(folder, {text: i for i, text in enumerate(tokens)})}
    # SentencePiece itself adds nothing; transformers' Llama tokenizer puts bos in front unless told not to.
    add_bos, add_eos = config.get("add_bos_token", True), config.get("add_eos_token", False)
    metadata |= special_values(ids, bool(add_bos) and "bos" in ids, bool(add_eos) and "eos" in ids)
    try:
        fast_tokenizer(metadata)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return metadata


def _added(folder: Path, config: dict[str, object]) -> Iterator[tuple[str, int, int]]:
    """Tokens beyond the pieces, as added_tokens.json and tokenizer_config.json number them."""
    for text, index in read_json(folder / "added_tokens.json").items():
        yield text, index, USER_DEFINED
    decoder = config.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        try:
            yield token["content"], int(key), CONTROL if token.get("special") else USER_DEFINED
        except MALFORMED as error:
            file = folder / "tokenizer_config.json"
            raise UserError(f"{file}: added_tokens_decoder has no token at {key!r}; correct it") from error


def _piece(raw: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(raw))
    text, score, kind = fields[1], fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has fields of other types")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], kind


def _signed(value: int | bytes) -> int:
    """An int32, which protobuf writes as 64 bits."""
    if isinstance(value, bytes):
        raise ValueError("an id is no number")
    return value - 2**64 if value >= 2**63 else value


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-size numbers as their bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(raw, at)
        elif kind in (_BYTES, _FIXED32, _FIXED64):
            size = {_FIXED32: 4, _FIXED64: 8}.get(kind)
            if size is None:
                size, at = _varint(raw, at)
            if at + size > len(raw):
                raise ValueError("cut short")
            value, at = raw[at : at + size], at + size
        else:
            raise ValueError(f"unknown wire type {kind}")
        yield tag >> 3, value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(raw) or shift > 63:
            raise ValueError("cut short")
        value |= (raw[at] & 127) << shift
        shift += 7
        at += 1
        if raw[at - 1] < 128:
            return value, at
