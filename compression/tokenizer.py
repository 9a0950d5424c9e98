"""A tokenizer's vocabulary as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import Value

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def _pre_tokenizer(spec: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for how text is split before merging.

    Only GPT-2's rule is recognised so far; a wrong name would tokenize silently
    differently, so anything else is refused.
    """
    if spec["model"].get("type") != "BPE":
        raise UserError(
            f"{file}: only byte-level BPE can be written so far, got {spec['model'].get('type')!r}"
        )
    for field, found in (
        ("normalizer", spec.get("normalizer")),
        ("ignore_merges", spec["model"].get("ignore_merges")),
    ):
        if found:
            raise UserError(f"{file}: {field} cannot be written to GGUF yet; use --no-export")
    pre = spec.get("pre_tokenizer") or {}
    if pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space"):
        return "gpt-2"
    raise UserError(
        f"{file}: pre-tokenizer {pre.get('type')!r} has no known llama.cpp name, so a GGUF would tokenize "
        "differently; use --no-export to search without writing a file"
    )


def gguf_tokenizer(folder: Path, vocabulary: int) -> dict[str, Value]:
    """Metadata of a byte-level BPE tokenizer.

    Args:
        folder: Checkpoint folder with tokenizer.json.
        vocabulary: Rows of the embedding; missing ids are filled as unused.

    Raises:
        UserError: No byte-level BPE, or a splitting rule llama.cpp has no name for.
    """
    file = folder / "tokenizer.json"
    try:
        spec = json.loads(file.read_text("utf-8"))
        model, pre = spec["model"], _pre_tokenizer(spec, file)
        tokens, kinds = _vocabulary(spec, vocabulary, file)
        merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        special = _special_ids(folder, {text: i for i, text in enumerate(tokens)})
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{file}: not a tokenizer ({type(error).__name__}: {error})") from error
    return {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", pre),
        "tokenizer.ggml.tokens": Value("str", tuple(tokens)),
        "tokenizer.ggml.token_type": Value("i32", tuple(kinds)),
        "tokenizer.ggml.merges": Value("str", merges),
        "tokenizer.ggml.add_bos_token": Value("bool", False),
        "tokenizer.ggml.add_eos_token": Value("bool", False),
        **{f"tokenizer.ggml.{k}_token_id": Value("u32", v) for k, v in special.items()},
    }


def _vocabulary(spec: dict[str, Any], size: int, file: Path) -> tuple[list[str], list[int]]:
    """Text and GGUF kind of every id; ids nothing claims are unused."""
    tokens, kinds = [f"[unused{i}]" for i in range(size)], [_UNUSED] * size
    claimed = [(text, index, _NORMAL) for text, index in spec["model"]["vocab"].items()]
    for added in spec.get("added_tokens", []):
        claimed.append((added["content"], added["id"], _CONTROL if added["special"] else _USER_DEFINED))
    for text, index, kind in claimed:
        if not 0 <= index < size:
            raise UserError(f"{file}: token id {index} is outside the model's vocabulary of {size}")
        tokens[index], kinds[index] = text, kind
    return tokens, kinds


def _special_ids(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """Ids of the special tokens that tokenizer_config.json names."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8")) if file.exists() else {}
    out = {}
    for gguf_name, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            out[gguf_name] = ids[text]
    return out
