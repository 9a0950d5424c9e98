"""Text to score on: documents, tokenized and cut into windows of one length."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compression.panics import PanicError, panics_raised
from spaces.errors import MALFORMED, UserError
from spaces.json_text import read_text

WINDOW = 256
MAX_BYTES = 2**30
"""Of a text file, which is read into memory; a search uses some hundred KB of it."""
_SPREAD = 8  # windows, at least, that a few tokens are spread over
_SHORTEST = 28  # tokens of a window cut short


@dataclass(frozen=True)
class TextSet:
    """Windows of token ids with where they come from.

    Attributes:
        name: search, selection, report or calibration.
        windows: (n, length) int32; the first m windows are a fair subset for every m.
        sources: (n,) name of the source of each window.
        bytes_per_token: UTF-8 bytes of the text over its tokens.
    """

    name: str
    windows: np.ndarray
    sources: tuple[str, ...]
    bytes_per_token: float

    @property
    def digest(self) -> str:
        """Names the windows: two sets with one digest have the same tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest()[:16]

    def head(self, tokens: int) -> TextSet:
        """The first windows that hold at least `tokens` tokens, or all."""
        count = min(len(self.windows), -(-tokens // self.windows.shape[1]))
        return TextSet(self.name, self.windows[:count], self.sources[:count], self.bytes_per_token)

    def spread(self, tokens: int) -> TextSet:
        """About `tokens` tokens of every kind of text: starts of the first windows, or whole ones.

        A few whole windows would be of a few sources only, and damage depends on the kind of text: an
        expert that one of them does not need looks useless.
        """
        length = self.windows.shape[1]
        kinds = min(max(_SPREAD, len(set(self.sources))), max(_SPREAD, tokens // _SHORTEST))
        # Two windows of each, if that leaves some text to attend to.
        count = min(len(self.windows), kinds * (2 if tokens >= 2 * kinds * _SHORTEST else 1))
        if tokens >= count * length:
            return self.head(tokens)
        short = self.windows[:count, : max(2, tokens // count)]
        return TextSet(self.name, short, self.sources[:count], self.bytes_per_token)


def read_documents(file: Path, option: str) -> list[tuple[str, str]]:
    """(source, text) of a .jsonl file of {"source", "text"}, or of a text file split at form feeds.

    A text file without form feeds is split into documents of about 4000 characters.

    Raises:
        UserError: The file is missing, not UTF-8, not JSON lines, or holds no text.
    """
    try:
        text = read_text(file, MAX_BYTES)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option} {file}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {file}: cannot be read ({reason}); give a text file") from error
    if file.suffix == ".jsonl":
        documents = []
        # Only newlines end a JSON line: splitlines would also cut at U+2028, which JSON leaves as it is.
        lines = text.removesuffix("\n").split("\n") if text else []
        for number, line in enumerate(lines, start=1):
            try:
                item = json.loads(line)
                if not isinstance(item["text"], str):
                    raise TypeError(f"text is {type(item['text']).__name__}")
                item["text"].encode()
                documents.append((str(item.get("source", file.stem)), item["text"]))
            except MALFORMED as error:
                raise UserError(
                    f'{option} {file}: line {number} must be {{"text": ...}} ({error})'
                ) from error
    else:
        parts = text.split("\f") if "\f" in text else _cut(text)
        documents = [(file.stem, part.strip()) for part in parts if part.strip()]
    if not documents:
        raise UserError(f"{option} {file}: holds no text")
    return documents


def _cut(text: str, size: int = 4000) -> list[str]:
    pieces, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        current += paragraph + "\n\n"
        if len(current) >= size:
            pieces.append(current)
            current = ""
    return [*pieces, current]


def make_windows(
    name: str, documents: list[tuple[str, str]], tokenizer: Any, tokens: int, window: int = WINDOW
) -> TextSet:
    """Cuts documents into windows of `window` tokens, sources taking turns, about `tokens` tokens in all.

    Raises:
        UserError: Less text than one window, or the tokenizer fails on it.
    """
    streams: dict[str, list[int]] = {}
    size = count = 0
    end = tokenizer.eos_token_id
    for source, text in documents:
        try:
            with panics_raised():
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except PanicError as error:
            raise UserError(
                f"the model's tokenizer fails on the {name} text of {source} ({error}); give other "
                "text, or a checkpoint with another tokenizer"
            ) from error
        size, count = size + len(text.encode()), count + len(ids)
        streams.setdefault(source, []).extend([*ids, *([end] if end is not None else [])])
    queues = {
        source: np.array(ids[: len(ids) // window * window], np.int32).reshape(-1, window)
        for source, ids in streams.items()
    }
    rows: list[np.ndarray] = []
    sources: list[str] = []
    for turn in range(max((len(q) for q in queues.values()), default=0)):
        for source, queue in queues.items():
            if turn < len(queue) and len(rows) * window < tokens:
                rows.append(queue[turn])
                sources.append(source)
    if not rows:
        option = "--calibration" if name in ("calibration", "repair") else "--text"
        raise UserError(
            f"{option}: the {name} text must hold at least one window of {window} tokens, got {count}; "
            "give more text"
        )
    return TextSet(name, np.stack(rows), tuple(sources), size / count)


def split_documents(
    documents: list[tuple[str, str]], names: tuple[str, ...]
) -> dict[str, list[tuple[str, str]]]:
    """Deals documents to disjoint sets by the hash of their text."""
    out: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for source, text in documents:
        digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
        out[names[digest[0] % len(names)]].append((source, text))
    return out
