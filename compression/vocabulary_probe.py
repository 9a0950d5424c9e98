"""A vocabulary's metadata tried in llama.cpp: does it give a tokenizer's ids?

llama.cpp throws through its C interface, which ends the process, on some bad
vocabularies; so `compression.vocabulary_child` runs it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.child import run_module
from spaces.errors import UserError
from spaces.gguf_layout import Value, header

_SECONDS = 300
_VOCABULARY_TOKENS = 1500  # of the vocabulary's own texts; enough to see merges, fast enough to try all names
_PER_TEXT = 25
_SPECIAL_TOKENS = 40

TEXTS: tuple[str, ...] = (
    "Hello world", " leading", "trailing ", "two  spaces   three    four", " ", "  ", "   ", "\t", "\n",
    "\n\n", "\n\n\n", "a\nb", "a \nb", "a  \n  b", "a\n\n  b\n", "\r\n", "line\r\nline\r\n\r\nend",
    "a\tb\t\tc",
    "\t\tdeep\n\t\t\tdeeper", " \n \n", "end.  ", "x\u00a0y", "\u3000wide", "a\u2028b", "zero\u200bwidth",
    "don't they'll we've I'm you're he's she'd", "DON'T THEY'LL WE'VE I'M YOU'RE HE'S SHE'D", "it'S We'Ll",
    "'tis rock'n'roll o'clock 'quoted' ''", "l'été qu'il d'accord", "x's'y", "'s 't",
    "1", "12", "123", "1234", "12345", "123456", "1234567", "12345678901234567890", "3.14159 1,000,000 007",
    "a  1", "x   12 y    345\t6",
    "a1b22c333d4444", "2024-01-31 12:34:56", "١٢٣٤ ४५६ ½ ² Ⅳ", "100%", "x1 2y", "v1.2.3-rc4",
    "HelloWorld camelCase snake_case SCREAMING_CASE iPhone McDonald XMLHttpRequest",
    "ALL CAPS sentence. Mixed Case Title", "ÉCOLE École ÜBER Über ǅ", "naïve café Straße Ærøskøbing",
    "e\u0301 cafe\u0301 n\u0303 \u0915\u094d\u0937", "Ångström K Å",
    "Привет, мир! Ещё раз. ПРИВЕТ", "Ελληνικά Αθήνα", "العربية مرحبا بالعالم، كيف؟", "שלום עולם",
    "हिन्दी में लिखा हुआ।", "ภาษาไทยไม่มีช่องว่าง", "한국어 문장입니다. 안녕하세요", "日本語のテキスト、カタカナ。",
    "中文，没有空格。你好！", "中文abc123中文", "漢字 かな カナ ﾊﾝｶｸ", "tiếng Việt", "ქართული Հայերեն",
    "\U0001f600", "emoji \U0001f642\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea \u2764\ufe0f \u2615", "\U0001d4d0\U0001d4d1 math", "𐐀𐐁",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]->c; }", "if(a<b&&c>=d||!e){return 'c';}",
    '{"key": [1, 2.5, null], "nested": {"a": "b\\n"}}', "<div class=\"x\">text</div>", "SELECT * FROM t;",
    "$x^2 + \\frac{1}{2}$ <=> ~`|", "https://example.com/path?q=1&r=%20#frag user@mail.org",
    "C:\\dir\\file.txt",
    "!!! ??? ... --- *** === ///", "...\n", "?!\n\n", "a.b,c;d:e", "(a) [b] {c} «d» „e“ ‘f’ “g” —h–",
    "@#$%^&*()_+-=[]{}|;':\",./<>?", "~~~\n```\ncode\n```", "- item\n- item\n\n1. one\n2. two", "a/b\\c",
    "##heading ## heading", "a" * 200, "ab" * 60, " " * 40 + "x", "0" * 50, "=" * 80,
    "In the beginning was the word.\nTo be, or not to be: that is the question.  So it goes.",
    "\u0000\u0001 control \u001b[0m", "\ufeffbom", "\ufffd",
)  # fmt: skip
"""What is compared first: whitespace, contractions, digits, case, scripts, emoji, code, punctuation."""


@dataclass(frozen=True)
class Trial:
    """What llama.cpp made of the texts under one pre-tokenizer's name.

    Attributes:
        name: The name; None where the metadata's own was used.
        equal: Texts whose ids are those expected.
        text: The first text whose ids are not, None if there is none.
        found: llama.cpp's ids of that text.
        error: Why there are no ids at all, None where there are.
    """

    name: str | None
    equal: int
    text: int | None = None
    found: tuple[int, ...] = ()
    error: str | None = None

    @property
    def agrees(self) -> bool:
        return self.text is None and self.error is None


def probe_texts(tokenizer: Any) -> list[str]:
    """Texts to compare a transformers tokenizer on: `TEXTS`, its special tokens, its vocabulary."""
    texts = [*TEXTS, "\n".join(TEXTS[:60]), " ".join(TEXTS)]
    added = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()})
    for token in added[:: max(1, len(added) // _SPECIAL_TOKENS)]:
        texts += [token, f"a{token}b", f"one {token} two", f"{token}{token}\n{token}1", f" {token} "]
    size = len(tokenizer)
    sample = [[i] for i in range(0, size, max(1, size // _VOCABULARY_TOKENS))]
    pieces = tokenizer.batch_decode(sample, clean_up_tokenization_spaces=False)
    pieces = [p for p in pieces if p and "\ufffd" not in p]
    texts += ["\n".join(pieces[i : i + _PER_TEXT]) for i in range(0, len(pieces), _PER_TEXT)]
    return list(dict.fromkeys(texts))


def trials(
    metadata: Mapping[str, Value],
    texts: Sequence[str],
    expected: Sequence[Sequence[int]],
    names: Sequence[str | None] = (None,),
) -> list[Trial]:
    """Tokenizes in llama.cpp, under one name after another until one agrees on every text.

    Args:
        metadata: The `tokenizer.*` entries of a GGUF file.
        texts: What to tokenize; special tokens written out in it are recognised.
        expected: The tokenizer's ids of each text, nothing added.
        names: Pre-tokenizers to try in place of the metadata's.

    Returns:
        One trial per name tried, the agreeing one last.

    Raises:
        UserError: The child process fails other than on a vocabulary, or takes too long.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        architecture = {"general.architecture": Value("str", "llama")}
        (folder / "vocabulary.gguf").write_bytes(header({**architecture, **metadata}, []))
        done: list[Trial] = []
        while len(done) < len(names) and not (done and done[-1].agrees):
            left = names[len(done) :]
            request = {"names": left, "texts": texts, "expected": [list(ids) for ids in expected]}
            (folder / "request.json").write_text(json.dumps(request), "utf-8")
            code, stderr = _run(folder)
            done = _answers(folder / "answers.jsonl")
            if code < 0:
                done.append(_death(folder / "answers.jsonl", names[len(done)], stderr))
            elif code:
                raise UserError(
                    f"llama.cpp could not be run on the vocabulary ({stderr[-200:]}); check that moefit's "
                    "dependencies are installed"
                )
    return done


def _run(folder: Path) -> tuple[int, str]:
    """Exit code and error output of a child that answers what is left."""
    try:
        return run_module("compression.vocabulary_child", str(folder), _SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"llama.cpp was not done with the vocabulary after {_SECONDS} s; use --no-export"
        ) from error


def _answers(file: Path) -> list[Trial]:
    answers = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    out = []
    for answer in answers:
        first = answer.get("first") or {"text": None, "found": ()}
        found = tuple(first["found"])
        out.append(Trial(answer["name"], answer["equal"], first["text"], found, answer.get("error")))
    return out


def _death(file: Path, name: str | None, stderr: str) -> Trial:
    """The answer of a child that llama.cpp ended, recorded as if it had given it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    answer = {"name": name, "equal": 0, "error": lines[-1] if lines else "llama.cpp died of it"}
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(answer) + "\n")
    return _answers(file)[-1]
