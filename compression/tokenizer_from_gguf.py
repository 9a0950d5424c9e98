"""A GGUF file's tokenizer as one of transformers, checked against llama.cpp's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from compression.panics import panics_raised
from compression.pre_tokenizers import BY_NAME, pre_tokenizer
from compression.tokenizer_check import Comparison
from compression.tokenizer_settings import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from spaces.errors import UserError, unknown
from spaces.gguf_layout import Value

_KEY = "tokenizer.ggml."
_LONGEST = 1024  # the longest tokens there are, runs of spaces, have a few hundred characters
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def fast_tokenizer(metadata: Mapping[str, Value]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file's metadata, which gives llama.cpp's ids.

    Args:
        metadata: At least the `tokenizer.*` entries.

    Raises:
        UserError: No tokenizer, a kind or pre-tokenizer that is not known, entries
            that do not fit together, or ids other than llama.cpp's.
    """
    values = {key: item.value for key, item in metadata.items() if key.startswith("tokenizer.")}
    model = values.get(f"{_KEY}model")
    makers = {"gpt2": _byte_level, "llama": _merging, "t5": _unigram}
    if model not in makers:
        raise unknown("tokenizer.ggml.model", str(model), makers)
    try:
        _check_lengths(values[f"{_KEY}tokens"])
        with panics_raised():
            tokenizer = makers[model](values)
            _add_tokens(tokenizer, values)
            _add_around(tokenizer, values)
            fast = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_special_texts(values)
            )
            fast.chat_template = _chat_template(values)
            comparison = Comparison.of(fast, json.loads(tokenizer.to_str()))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            f"the file's tokenizer metadata does not fit together ({type(error).__name__}: "
            f"{str(error)[:200]}); convert the file again"
        ) from error
    (trial,) = comparison.trials({k: v for k, v in metadata.items() if k.startswith("tokenizer.")})
    if not trial.agrees:
        raise UserError(
            f"the file's {model} tokenizer cannot be rebuilt for transformers: in "
            f"{comparison.difference(trial)} in llama.cpp; give the original checkpoint's tokenizer"
        )
    return fast


def _check_lengths(tokens: Any) -> None:
    """Refuses tokens of a length no vocabulary has: all ways to cut one in two are looked at."""
    longest = max(tokens, key=len, default="")
    if len(longest) > _LONGEST:
        raise UserError(
            f"tokenizer.ggml.tokens: a token of {len(longest)} characters, more than the {_LONGEST} taken "
            "here; convert the file again"
        )


def _byte_level(values: Mapping[str, Any]) -> Tokenizer:
    pre = values.get(f"{_KEY}pre", "default")
    if pre not in BY_NAME:
        raise unknown("tokenizer.ggml.pre", str(pre), BY_NAME)
    splitting = BY_NAME[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in values[f"{_KEY}merges"]]
    vocabulary = {text: i for i, text in enumerate(values[f"{_KEY}tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merging(values: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: its merges follow from which pieces there are and how they score."""
    tokens, scores, kinds = (values[f"{_KEY}{name}"] for name in ("tokens", "scores", "token_type"))
    vocabulary = {text: i for i, text in enumerate(tokens)}
    joined = {text: i for text, i in vocabulary.items() if kinds[i] in (NORMAL, USER_DEFINED)}
    merges = [
        (-scores[index], index, text[:cut], text[cut:])
        for text, index in joined.items()
        for cut in range(1, len(text))
        if text[:cut] in joined and text[cut:] in joined
    ]
    pieces = [(left, right) for _, _, left, right in sorted(merges)]
    unknown_text = next((tokens[i] for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=pieces,
            unk_token=unknown_text,
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    return _spaced(tokenizer, bool(values.get(f"{_KEY}add_space_prefix", True)))


def _unigram(values: Mapping[str, Any]) -> Tokenizer:
    if values.get(f"{_KEY}precompiled_charsmap"):
        raise UserError(
            "tokenizer.ggml.precompiled_charsmap is not read yet; give the checkpoint's tokenizer"
        )
    tokens, scores, kinds = (values[f"{_KEY}{name}"] for name in ("tokens", "scores", "token_type"))
    low = min(scores) - 1e3
    pieces = [
        (t, low if k in (CONTROL, UNUSED) else s) for t, s, k in zip(tokens, scores, kinds, strict=True)
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, kinds.index(UNKNOWN), False))
    one_space = bool(values.get(f"{_KEY}remove_extra_whitespaces", False))
    return _spaced(tokenizer, bool(values.get(f"{_KEY}add_space_prefix", True)), one_space)


def _spaced(tokenizer: Tokenizer, prefix: bool, one_space: bool = False) -> Tokenizer:
    """Spaces written as ▁, as SentencePiece does."""
    steps: list[Any] = []
    if one_space:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    steps += [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, values: Mapping[str, Any]) -> None:
    """Tokens that are cut out of a text before it is split."""
    kinds = values.get(f"{_KEY}token_type", ())
    for text, kind in zip(values[f"{_KEY}tokens"], kinds, strict=False):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            special = kind != USER_DEFINED
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])


def _add_around(tokenizer: Tokenizer, values: Mapping[str, Any]) -> None:
    """The bos and eos put around a text."""
    tokens = values[f"{_KEY}tokens"]
    # What llama.cpp does where the file does not say.
    defaults = {"bos": values[f"{_KEY}model"] == "llama", "eos": values[f"{_KEY}model"] == "t5"}
    ids = {"llama": {"bos": 1, "eos": 2}, "t5": {"eos": 1}}.get(values[f"{_KEY}model"], {})
    added = {
        name: tokens[values.get(f"{_KEY}{name}_token_id", ids.get(name, 0))]
        for name, default in defaults.items()
        if values.get(f"{_KEY}add_{name}_token", default)
    }
    if added:
        around = [added.get("bos"), "$A", added.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in around if part],
            special_tokens=[(text, tokenizer.token_to_id(text)) for text in set(added.values())],
        )


def _special_texts(values: Mapping[str, Any]) -> dict[str, str]:
    tokens = values[f"{_KEY}tokens"]
    found = {name: values.get(f"{_KEY}{key}_token_id") for key, name in _SPECIAL.items()}
    return {name: tokens[index] for name, index in found.items() if index is not None and index < len(tokens)}


def _chat_template(values: Mapping[str, Any]) -> str | dict[str, str] | None:
    main = values.get("tokenizer.chat_template")
    others = {
        name: values[f"tokenizer.chat_template.{name}"]
        for name in values.get("tokenizer.chat_templates", ())
        if f"tokenizer.chat_template.{name}" in values
    }
    if not others:
        return main
    return {**({"default": main} if main else {}), **others}
