"""A tokenizer's vocabulary as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spaces.errors import UserError
from spaces.gguf_layout import Value

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # gguf.TokenType


def _pre_tokenizer(spec: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for how text is split before merging.

    Only GPT-2's rule is recognised so far; a wrong name would tokenize silently
    differently, so anything else is refused.
    """
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
        model = spec["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a tokenizer ({error})") from error
    if model.get("type") != "BPE":
        raise UserError(
            f"{file}: only byte-level BPE can be written to GGUF so far, got {model.get('type')!r}"
        )
    pre = _pre_tokenizer(spec, file)
    tokens = [f"[unused{i}]" for i in range(vocabulary)]
    kinds = [_UNUSED] * vocabulary
    added = {t["id"]: t["content"] for t in spec.get("added_tokens", []) if t.get("special")}
    for text, index in {**model["vocab"], **{c: i for i, c in added.items()}}.items():
        if index >= vocabulary:
            raise UserError(f"{file}: token id {index} is outside the model's vocabulary of {vocabulary}")
        tokens[index], kinds[index] = text, _CONTROL if index in added else _NORMAL
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    values = {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", pre),
        "tokenizer.ggml.tokens": Value("str", tuple(tokens)),
        "tokenizer.ggml.token_type": Value("i32", tuple(kinds)),
        "tokenizer.ggml.merges": Value("str", merges),
        "tokenizer.ggml.add_bos_token": Value("bool", False),
        "tokenizer.ggml.add_eos_token": Value("bool", False),
    }
    special = _special_ids(folder, {text: i for i, text in enumerate(tokens)})
    return values | {f"tokenizer.ggml.{k}_token_id": Value("u32", v) for k, v in special.items()}


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
