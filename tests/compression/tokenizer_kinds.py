"""Small tokenizers of the kinds that published models have, and llama.cpp's ids for their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from compression import llama_symbols as llama
from compression.pre_tokenizers import BY_NAME
from compression.vocabulary_child import _load
from compression.vocabulary_probe import TEXTS
from spaces.gguf_layout import Value, header
from tests.conftest import REFERENCE

END, START = "<|end|>", "<|start_of_text|>"

# Splitting regexes as the models' own tokenizer.json files have them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)


def split(*patterns: str) -> list[Any]:
    """Isolating splits, then bytes as GPT-2's letters."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
NFC = normalizers.NFC()

BYTE_LEVEL: dict[str, tuple[str, list[Any], bool, Any]] = {
    # family: (llama.cpp's name, pre-tokenizer, ignore_merges, normalizer)
    "gpt2": ("gpt-2", [GPT2_BYTES], False, None),
    "olmoe": ("gpt-2", [GPT2_BYTES], False, NFC),
    "llama3": ("llama-bpe", split(LLAMA3), True, None),
    "chatglm": ("chatglm-bpe", split(LLAMA3), False, None),
    "qwen3-moe": ("qwen2", split(QWEN2), False, NFC),
    "gpt-oss": ("gpt-4o", split(O200K), False, None),
    "deepseek-v3": ("deepseek-v3", split(*DEEPSEEK_V3), False, None),
    # Digits stand alone here, and in llama.cpp only for want of tokens that join them.
    "deepseek-v2": (
        "deepseek-llm",
        [
            *split(*BY_NAME["deepseek-llm"].patterns[:5])[:-1],
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        False,
        None,
    ),
    "tekken": ("tekken", split(TEKKEN), True, None),
    "smollm": ("smollm", [pre_tokenizers.Digits(individual_digits=True), GPT2_BYTES], False, None),
    "ling": ("bailingmoe", split(BAILING), False, None),
}
PIECES = ("llama", "mixtral", "no prefix", "unigram")


@cache
def corpus() -> tuple[str, ...]:
    lines = (REFERENCE / "texts" / "calibration.jsonl").read_text("utf-8").splitlines()[:40]
    return tuple(json.loads(line)["text"][:4000] for line in lines) + tuple(
        # llama.cpp reads a token up to its first NUL.
        text
        for text in TEXTS * 3
        if "\0" not in text
    )


def byte_level(
    steps: Sequence[Any],
    *,
    ignore_merges: bool = False,
    normalizer: Any = None,
    size: int = 1200,
    special: Sequence[str] = (END, START),
) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on a little text."""
    out = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    out.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        out.normalizer = normalizer
    out.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    out.train_from_iterator(corpus(), trainer)
    return out


def in_pieces(kind: str, *, byte_pieces: bool = True) -> Tokenizer:
    """A tokenizer that writes spaces as ▁: merges with byte fallback, or Unigram."""
    if kind == "unigram":
        trained = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=800, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        )
    else:
        trained = Tokenizer(models.BPE())
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] if byte_pieces else []
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *pieces], limit_alphabet=150,
            show_progress=False,
        )  # fmt: skip
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus(), trainer)
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    if kind == "unigram":
        # As SentencePiece trains them: equal totals are then equal in llama.cpp too.
        spec["model"]["vocab"] = [[text, float(np.float32(score))] for text, score in spec["model"]["vocab"]]
    else:
        spec["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    out = Tokenizer.from_str(json.dumps(spec))
    if kind == "mixtral":
        out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Replace(" ", "▁")]
        out.normalizer = normalizers.Sequence(
            steps if kind == "no prefix" else [normalizers.Prepend("▁"), *steps]
        )
        out.pre_tokenizer = None
    out.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return out


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    """A checkpoint folder's tokenizer files."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return folder


class LlamaIds:
    """llama.cpp's ids of a text under some metadata that is known to load."""

    def __init__(self, metadata: Mapping[str, Value], folder: Path, name: str | None = None) -> None:
        file = folder / "vocabulary.gguf"
        file.write_bytes(header({"general.architecture": Value("str", "llama"), **metadata}, []))
        self._model = _load(file, name)  # kept: the vocabulary is part of it
        self.vocabulary = llama.library().llama_model_get_vocab(self._model)

    def __call__(self, text: str) -> list[int]:
        return llama.tokenize(self.vocabulary, text)


_CHUNKS = (
    "the", "The", "THE", "a", "B", "don't", "WE'LL", "'s", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t",
    ".", ",", "!?", "...", "(", ")", "{}", "::", "#", "//", "==", "-", "_", "$", "1", "23", "456", "7890",
    "½", "é", "École", "ß", "привет", "МИР", "中文", "かな", "カナ", "한글", "مرحبا", "हिन्दी", "🙂", "👩‍👧",
    "❤️", "\u00a0", "\u200b", END, START, "<s>", "</s>", "<|en", "▁",
)  # fmt: skip


def random_text(*without: str) -> st.SearchStrategy[str]:
    """Text of what tokenizers split differently."""
    chunks = [chunk for chunk in _CHUNKS if chunk not in without]
    letters = st.text("abcdefgstmrvlXYZ 0123456789'.\n", min_size=1, max_size=6)
    return st.lists(st.sampled_from(chunks) | letters, max_size=12).map("".join)
