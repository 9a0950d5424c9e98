"""llama.cpp's names for how text is split before merging, and what each name does.

The names are those that build 11549 loads (`llama_vocab::impl::load` in
src/llama-vocab.cpp); the rules are the regexes of the tokenizers the names
stand for, as published in their tokenizer.json and named in that file's comments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ASCII_SIGN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_MARKED_WORD = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_SENTENCE = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CASED = "".join(
    chr(a) if a == b else f"{chr(a)}-{chr(b)}"
    for a, b in (
        (0x41, 0x5A), (0x61, 0x7A), (0xB5, 0xB5), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x1BA), (0x1BC, 0x1BF),
        (0x1C4, 0x293), (0x295, 0x2AF), (0x370, 0x373), (0x376, 0x376), (0x377, 0x377), (0x37B, 0x37D),
        (0x37F, 0x37F), (0x386, 0x386), (0x388, 0x38A), (0x38C, 0x38C), (0x38E, 0x3A1), (0x3A3, 0x3F5),
        (0x3F7, 0x481), (0x48A, 0x52F), (0x531, 0x556), (0x10A0, 0x10C5), (0x13A0, 0x13F5), (0x13F8, 0x13FD),
        (0x1C90, 0x1CBA), (0x1CBD, 0x1CBF), (0x1D00, 0x1D2B), (0x1D6B, 0x1D77), (0x1D79, 0x1D9A),
        (0x1E00, 0x1F15), (0x1F18, 0x1F1D), (0x1F20, 0x1F45), (0x1F48, 0x1F4D), (0x1F50, 0x1F57),
        (0x1F59, 0x1F59), (0x1F5B, 0x1F5B), (0x1F5D, 0x1F5D), (0x1F5F, 0x1F7D), (0x1F80, 0x1FB4),
        (0x1FB6, 0x1FBC), (0x1FBE, 0x1FBE), (0x1FC2, 0x1FC4), (0x1FC6, 0x1FCC), (0x1FD0, 0x1FD3),
        (0x1FD6, 0x1FDB), (0x1FE0, 0x1FEC), (0x1FF2, 0x1FF4), (0x1FF6, 0x1FFC), (0x2102, 0x2102),
        (0x2107, 0x2107), (0x210A, 0x2113), (0x2115, 0x2115), (0x2119, 0x211D), (0x2124, 0x2124),
        (0x2126, 0x2126), (0x2128, 0x2128), (0x212A, 0x212D), (0x212F, 0x2134), (0x2139, 0x2139),
        (0x213C, 0x213F), (0x2145, 0x2149), (0x214E, 0x214E), (0x2183, 0x2184), (0x2C00, 0x2C7B),
        (0x2C7E, 0x2CE4), (0x2CEB, 0x2CEE), (0x2CF2, 0x2CF3), (0xA640, 0xA66D), (0xA680, 0xA69B),
        (0xA722, 0xA76F), (0xA771, 0xA787), (0xA78B, 0xA78E), (0xAB70, 0xABBF), (0xFB00, 0xFB06),
        (0xFB13, 0xFB17), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A), (0x10400, 0x1044F), (0x104B0, 0x104D3),
        (0x104D8, 0x104FB), (0x10C80, 0x10CB2), (0x10CC0, 0x10CF2), (0x118A0, 0x118DF), (0x1E900, 0x1E943),
    )
)  # fmt: skip
"""Letters with case, as deepseek-llm's regex spells them out."""


def _tiktoken(digits: str, *, endings: str = f"{_ENDINGS}|", word: str = _WORD, signs: str = _SIGNS) -> str:
    """The form most newer tokenizers share."""
    return rf"{endings}{word}|{digits}|{signs}|{_BLANKS}"


def _o200k(digits: str, *, endings: str = f"{_ENDINGS}?", han: str = "", first: str = "") -> str:
    """The form that splits words at changes of case; `han` takes Han letters out of words."""
    word = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = f"[{_UPPER}{han}]", f"[{_LOWER}{han}]"
    signs = r" ?[^\s\p{L}\p{N}]+[\r\n/]*" if not han else _SIGNS
    return (
        rf"{first}{word}{upper}*{lower}+{endings}|{word}{upper}+{lower}*{endings}|{digits}|{signs}|{_BLANKS}"
    )


@dataclass(frozen=True)
class Splitting:
    """One way to split, under all its names.

    Attributes:
        names: llama.cpp's names; they differ only in defaults that a GGUF file sets anyway.
        patterns: Regexes (Oniguruma's syntax), each applied to the pieces of the one before it; what
            matches becomes a piece, and so does what lies between.
        ignore_merges: A piece that is a token is that token, whatever the merges say.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False


_JAPANESE_CHINESE = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASIAN = "[一-龥ࠀ-一가-\ud7ff]+"

SPLITTINGS: tuple[Splitting, ...] = (
    Splitting(
        ("gpt-2", "olmo", "mpt", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat",
         "a.x-4.0", "mellum", "modern-bert", "exaone4", "jais", "trillion", "granite-docling"),
        (_GPT2,),
    ),
    Splitting(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
         "jina-v5-nano", "glm4", "glm5"),
        (_tiktoken(r"\p{N}{1,3}"),),
        ignore_merges=True,
    ),
    Splitting(("chatglm-bpe", "dbrx", "smaug-bpe"), (_tiktoken(r"\p{N}{1,3}"),)),
    Splitting(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "stablelm2", "solar-open",
         "grok-2"),
        (_tiktoken(r"\p{N}"),),
    ),
    Splitting(
        ("qwen35",),
        (_tiktoken(r"\p{N}", word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                   signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),),
    ),
    Splitting(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        (r"\p{N}{1,3}", _JAPANESE_CHINESE,
         rf"{_ASCII_SIGN_WORD}|{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"),
    ),
    Splitting(
        ("deepseek-llm",),
        (r"[\r\n]", rf"\s?[{_CASED}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _ASIAN, r"\p{N}+"),
    ),
    Splitting(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    Splitting(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_o200k(r"\p{N}{1,3}"),)),
    Splitting(("tekken",), (_o200k(r"\p{N}", endings=""),), ignore_merges=True),
    Splitting(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", _GPT2),
    ),
    Splitting(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    Splitting(
        ("kimi-k2",),
        (_o200k(r"\p{N}{1,3}", han=r"&&[^\p{Han}]", first=r"[\p{Han}]+|"),),
    ),
    Splitting(
        ("afmoe",),
        (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
         "[一-鿿㐀-䶿豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+",
         rf"{_ASCII_SIGN_WORD}|{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"),
    ),
    Splitting(("laguna",), (r"[^\n]+|[\n]+", _tiktoken(r"\p{N}"))),
    Splitting(
        ("seed-coder",),
        (_tiktoken(r"\p{N}{1}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"),),
    ),
    Splitting(("minicpm5",), (r"\p{N}{1,3}", _tiktoken(r"\p{N}+")), ignore_merges=True),
    Splitting(("ufakzeka",), (_tiktoken(r"\p{N}", endings=""),)),
    Splitting(
        ("exaone-moe",),
        (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    Splitting(("tiny_aya", "cohere2moe"), (r"\d{1,3}(?=(?:\d{3})*\b)", _o200k(r"\p{N}{1,3}"))),
    Splitting(
        ("youtu",),
        ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+", _o200k(r"\p{N}")),
        ignore_merges=True,
    ),
    Splitting(
        ("spark2_5",),
        (r"\p{N}{1,3}", _JAPANESE_CHINESE,
         rf"{_ASCII_SIGN_WORD}|{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    ),
    Splitting(
        ("jais-2",),
        (rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|"
         + "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}",),
    ),
    Splitting(("superbpe",), (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    Splitting(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    Splitting(("bloom", "poro-chat", "gpt3-finnish"), (_SENTENCE,)),
    Splitting(("viking",), (_SENTENCE, r"\p{N}")),
    Splitting(
        ("chameleon",),
        (r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
         r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
    ),
    Splitting(("default",), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
)  # fmt: skip
"""Every way of llama.cpp's to split text for byte-level BPE, the common ones first."""

BY_NAME: Mapping[str, Splitting] = {name: s for s in SPLITTINGS for name in s.names}


def pre_tokenizer(splitting: Splitting) -> Any:
    """The splitting as a pre-tokenizer of the `tokenizers` package, bytes written as GPT-2's letters."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def likely_first(own: Any, ignore_merges: bool, texts: Sequence[str]) -> list[Splitting]:
    """All ways to split, first those that split most of `texts` into the pieces that `own` does.

    Args:
        own: A pre-tokenizer of the `tokenizers` package; None leaves a text whole.
        ignore_merges: What to prefer among equals.
        texts: What to split.
    """

    def likeness(splitting: Splitting) -> tuple[int, bool]:
        return -len(split_otherwise(own, splitting, texts)), splitting.ignore_merges == ignore_merges

    return sorted(SPLITTINGS, key=likeness, reverse=True)


def split_otherwise(own: Any, splitting: Splitting, texts: Sequence[str]) -> list[str]:
    """The texts that `own` (as in `likely_first`) splits into other pieces."""
    theirs = pre_tokenizer(splitting)
    return [text for text in texts if _pieces(own, text) != _pieces(theirs, text)]


def _pieces(splitter: Any, text: str) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter is not None else [text]
