"""A checkpoint's tokenizer as GGUF metadata, checked in llama.cpp against the tokenizer itself."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from compression.checkpoint import load_tokenizer
from compression.sentencepiece_model import sentencepiece_metadata
from compression.tokenizer_bpe import byte_level_bpe
from compression.tokenizer_check import Comparison
from compression.tokenizer_settings import (
    chat_metadata,
    chat_templates,
    check_ids,
    read_json,
    special_metadata,
)
from compression.tokenizer_spm import is_sentencepiece, sentencepiece
from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import Value

_MODELS = ("BPE", "Unigram")
_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "config.json",
    "generation_config.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def gguf_tokenizer(folder: Path, vocabulary: int) -> dict[str, Value]:
    """Metadata of the tokenizer, under which llama.cpp was seen to give the tokenizer's ids.

    A folder's answer is kept in memory for as long as its files stay the same.
    llama.cpp does not compose accents, and its SentencePiece always puts a space
    before a text; the ids agree on text that is composed and begins with none.

    Args:
        folder: Checkpoint folder with tokenizer.json, or tokenizer.model alone.
        vocabulary: Rows of the embedding; missing ids are filled as unused.

    Raises:
        UserError: No tokenizer, a damaged one, or one that llama.cpp tokenizes
            differently from.
    """
    return dict(_metadata(folder.resolve(), vocabulary, _digest(folder)))


def no_tokenizer(architecture: str, vocabulary: int) -> dict[str, Value]:
    """Metadata of a file that has no tokenizer, for a model of `vocabulary` ids."""
    return {
        "tokenizer.ggml.model": Value("str", "none"),
        f"{architecture}.vocab_size": Value("u32", vocabulary),
    }


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for pattern in _FILES:
        for file in sorted(folder.glob(pattern)):
            try:
                digest.update(f"{file}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error}); check its permissions") from error
    return digest.hexdigest()


@cache
def _metadata(folder: Path, vocabulary: int, digest: str) -> dict[str, Value]:
    """`digest` stands for the files' contents."""
    file = folder / "tokenizer.json"
    if file.exists():
        values = _from_json(folder, file, vocabulary)
    elif (folder / "tokenizer.model").exists():
        values = sentencepiece_metadata(folder, vocabulary)
    else:
        raise UserError(f"{file}: missing, and so is tokenizer.model; download the tokenizer, or --no-export")
    return {**values, **chat_metadata(chat_templates(folder))}


def _from_json(folder: Path, file: Path, vocabulary: int) -> dict[str, Value]:
    try:
        _check(read_json(file), vocabulary, file)
        tokenizer = load_tokenizer(folder)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        # transformers adds tokens that its class names but the checkpoint lacks.
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < vocabulary]
        comparison = Comparison.of(tokenizer, spec)
        write = sentencepiece if is_sentencepiece(spec) else byte_level_bpe
        tokens, values = write(spec, vocabulary, comparison, file)
        return {**values, **special_metadata(folder, tokens, tokenizer)}
    except UserError as error:
        # What transformers cannot load is told by folder only.
        if str(file) in str(error) or ".json" in str(error):
            raise
        raise UserError(
            f"{file}: {error}; GGUF takes BPE and Unigram tokenizers that transformers loads; download it "
            "again, or use --no-export"
        ) from error
    except MALFORMED as error:
        raise UserError(
            f"{file}: not a tokenizer ({type(error).__name__}: {error}); download it again"
        ) from error


def _check(spec: dict[str, Any], vocabulary: int, file: Path) -> None:
    """Refuses a tokenizer.json of a kind that cannot be written, or whose ids have no rows."""
    kind = spec["model"].get("type", "BPE")
    if kind not in _MODELS:
        raise UserError(
            f"{file}: only {' and '.join(_MODELS)} can be written to GGUF, got {kind!r}; use --no-export"
        )
    entries = spec["model"]["vocab"]
    ids = list(entries.values()) if isinstance(entries, dict) else list(range(len(entries)))
    check_ids([*ids, *(token["id"] for token in spec.get("added_tokens", []))], vocabulary, file)
