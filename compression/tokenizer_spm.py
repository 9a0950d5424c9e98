"""SentencePiece-like tokenizers as GGUF metadata: BPE on characters with byte fallback, and Unigram.

llama.cpp's "llama" merges the adjacent pieces whose joint piece scores highest;
"t5" takes the pieces of the highest total score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compression.tokenizer_bpe import added_claims
from compression.tokenizer_check import Comparison, steps
from compression.tokenizer_settings import BYTE, NORMAL, UNKNOWN, named_tokens
from spaces.errors import UserError
from spaces.gguf_layout import Value

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_LOWEST = -1e6  # of what no text may become: below every score and every merge's rank


def is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json marks spaces by ▁, as SentencePiece does."""
    if spec["model"].get("type") == "Unigram":
        return True
    marks = any(
        step.get("type") == "Metaspace" or "▁" in (step.get("content"), step.get("prepend"))
        for step in (*steps(spec.get("normalizer")), *steps(spec.get("pre_tokenizer")))
    )
    return marks or bool(spec["model"].get("byte_fallback"))


def sentencepiece(
    spec: Mapping[str, Any], size: int, comparison: Comparison, file: Path
) -> tuple[list[str], dict[str, Value]]:
    """Texts of all ids, and the vocabulary's metadata.

    Args:
        spec: A tokenizer.json for which `is_sentencepiece` holds.
        size: Rows of the embedding.
        comparison: The tokenizer's ids on the probe texts.
        file: For messages.

    Raises:
        UserError: An id without a row, or llama.cpp gives other ids.
    """
    pieces = list(_unigram(spec) if spec["model"]["type"] == "Unigram" else _ranked(spec))
    claims = [(text, index, kind) for text, index, kind, _ in pieces]
    unknown = {text for text, _, kind in claims if kind == UNKNOWN}
    claims += [claim for claim in added_claims(spec) if claim[0] not in unknown]
    tokens, kinds = named_tokens(claims, size, file)
    scores = [_LOWEST] * size
    for _, index, _, score in pieces:
        scores[index] = score
    failures = []
    for variant in _variants(spec):
        metadata = piece_metadata(tokens, kinds, scores, **variant)
        (trial,) = comparison.trials(metadata)
        if trial.agrees:
            return tokens, metadata
        failures.append((trial.equal, variant["model"], comparison.difference(trial)))
    _, model, difference = max(failures)
    raise UserError(
        f"{file}: llama.cpp gives other ids for this {spec['model']['type']} tokenizer; nearest is its "
        f"{model!r} model, where in {difference}; use --no-export to search without writing a file"
    )


def piece_metadata(
    tokens: Sequence[str],
    kinds: Sequence[int],
    scores: Sequence[float],
    *,
    model: str,
    space_prefix: bool,
    one_space: bool = False,
) -> dict[str, Value]:
    """A vocabulary of scored pieces.

    Args:
        tokens, kinds, scores: Text, `gguf.TokenType` and score of every id.
        model: `llama` or `t5`.
        space_prefix: A space is put before a text.
        one_space: Runs of spaces become one, those at the ends none.
    """
    out = {
        "tokenizer.ggml.model": Value("str", model),
        "tokenizer.ggml.pre": Value("str", "default"),
        "tokenizer.ggml.tokens": Value("str", tuple(tokens)),
        "tokenizer.ggml.scores": Value("f32", tuple(float(score) for score in scores)),
        "tokenizer.ggml.token_type": Value("i32", tuple(kinds)),
        "tokenizer.ggml.add_space_prefix": Value("bool", space_prefix),
    }
    if one_space:
        out["tokenizer.ggml.remove_extra_whitespaces"] = Value("bool", True)
    if model == "t5" and UNKNOWN in kinds:
        out["tokenizer.ggml.unknown_token_id"] = Value("u32", list(kinds).index(UNKNOWN))
    return out


def _variants(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What to try, as arguments of `piece_metadata`."""
    prefix = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for step in (*steps(spec.get("normalizer")), *steps(spec.get("pre_tokenizer")))
    )
    if spec["model"]["type"] == "Unigram":
        for one_space in (False, True):
            yield {"model": "t5", "space_prefix": prefix, "one_space": one_space}
    yield {"model": "llama", "space_prefix": prefix}


def _kind(text: str, unknown: str | None, byte_fallback: bool) -> int:
    if text == unknown:
        return UNKNOWN
    return BYTE if byte_fallback and _BYTE_PIECE.fullmatch(text) else NORMAL


def _ranked(spec: Mapping[str, Any]) -> Iterator[tuple[str, int, int, float]]:
    """(text, id, kind, score) of a BPE vocabulary: the earlier a piece is merged, the higher it scores."""
    model = spec["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        text = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(text, rank)
    for text, index in model["vocab"].items():
        kind = _kind(text, model.get("unk_token"), bool(model.get("byte_fallback")))
        # Single characters are never merged, so that theirs does not matter.
        score = -float(ranks[text]) if text in ranks else (0.0 if kind != NORMAL else -float(len(ranks)))
        yield text, index, kind, score


def _unigram(spec: Mapping[str, Any]) -> Iterator[tuple[str, int, int, float]]:
    """(text, id, kind, score) of a Unigram vocabulary."""
    model = spec["model"]
    for index, (text, score) in enumerate(model["vocab"]):
        kind = _kind(text, None, bool(model.get("byte_fallback")))
        yield text, index, UNKNOWN if index == model.get("unk_id") else kind, score
