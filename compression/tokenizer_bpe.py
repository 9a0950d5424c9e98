"""Byte-level BPE as GGUF metadata, under the pre-tokenizer's name that gives the tokenizer's ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.pre_tokenizers import Splitting, likely_first, split_otherwise
from compression.tokenizer_check import Comparison
from compression.tokenizer_settings import CONTROL, NORMAL, USER_DEFINED, named_tokens
from compression.vocabulary_probe import TEXTS, Trial
from spaces.errors import UserError
from spaces.gguf_layout import Value

_TRIED = 6  # names; loading a large vocabulary takes about a second
_MATTERING = 3000  # texts of tokens


def byte_level_bpe(
    spec: Mapping[str, Any], size: int, comparison: Comparison, file: Path
) -> tuple[list[str], dict[str, Value]]:
    """Texts of all ids, and the vocabulary's metadata.

    Args:
        spec: A tokenizer.json whose model is BPE.
        size: Rows of the embedding.
        comparison: The tokenizer's ids on the probe texts.
        file: For messages.

    Raises:
        UserError: An id without a row, merges GGUF cannot hold, or no pre-tokenizer
            of llama.cpp's gives the tokenizer's ids.
    """
    claims = [(text, index, NORMAL) for text, index in spec["model"]["vocab"].items()]
    claims += added_claims(spec)
    tokens, kinds = named_tokens(claims, size, file)
    pairs = [m.split(" ") if isinstance(m, str) else list(m) for m in spec["model"]["merges"]]
    if any(len(pair) != 2 or " " in "".join(pair) for pair in pairs):
        raise UserError(f"{file}: a merge of tokens with spaces cannot be written to GGUF; use --no-export")
    metadata = {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", ""),
        "tokenizer.ggml.tokens": Value("str", tuple(tokens)),
        "tokenizer.ggml.token_type": Value("i32", tuple(kinds)),
        "tokenizer.ggml.merges": Value("str", tuple(" ".join(pair) for pair in pairs)),
    }
    name = _pre_tokenizer(spec, metadata, comparison, file)
    return tokens, {**metadata, "tokenizer.ggml.pre": Value("str", name)}


def added_claims(spec: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(text, id, kind) of the tokens that are cut out of a text before it is split."""
    return [
        (token["content"], token["id"], CONTROL if token["special"] else USER_DEFINED)
        for token in spec.get("added_tokens", [])
    ]


def _pre_tokenizer(
    spec: Mapping[str, Any], metadata: Mapping[str, Value], comparison: Comparison, file: Path
) -> str:
    """The name under which llama.cpp splits text as the tokenizer does.

    A wrong name would tokenize differently without an error, so none is taken
    that has not given every id of the probe texts.
    """
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    order = likely_first(_own(comparison), ignore_merges, TEXTS)[:_TRIED]
    nearest: tuple[Comparison, Trial] | None = None
    while order:
        done = comparison.trials(metadata, [splitting.names[0] for splitting in order])
        on, trial = comparison, done[-1]
        if trial.agrees:
            on = _where_it_matters(comparison, order[len(done) - 1])
            (trial,) = on.trials(metadata, [trial.name]) if on.texts else (trial,)
            if trial.agrees:
                return str(trial.name)
        nearest = nearest or ((comparison, done[0]) if not done[0].agrees else (on, trial))
        order = order[len(done) :]
    assert nearest is not None  # there are names to try
    setting = " (it has ignore_merges set)" if ignore_merges else ""
    raise UserError(
        f"{file}: its pre-tokenizer{setting} or normalizer{_normalizer(spec)} gives other ids than those "
        f"of llama.cpp; nearest is {nearest[1].name!r}, where in {nearest[0].difference(nearest[1])}; use "
        "--no-export to search without writing a file"
    )


def _own(comparison: Comparison) -> Any:
    return comparison.tokenizer.backend_tokenizer.pre_tokenizer


def _where_it_matters(comparison: Comparison, splitting: Splitting) -> Comparison:
    """Tokens' texts that the tokenizer splits otherwise; none if the rule seems to be its own.

    A rule that is not quite the tokenizer's may give all ids of the probe texts
    because none of their tokens reaches across a place where only one rule splits.
    """
    own, size = _own(comparison), len(comparison.tokenizer)
    if not split_otherwise(own, splitting, TEXTS):
        return comparison.on([])
    texts = comparison.tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    return comparison.on(
        [t for t in split_otherwise(own, splitting, texts) if "\ufffd" not in t][:_MATTERING]
    )


def _normalizer(spec: Mapping[str, Any]) -> str:
    kind = (spec.get("normalizer") or {}).get("type")
    return f" {kind!r}" if kind else ""
