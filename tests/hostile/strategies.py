"""hypothesis strategies of nearly valid inputs, by the name of the target.

A change is drawn as one number: with 100,000 inputs a draw costs more than what it is for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

import search.export
import search.options
import search.report.__main__ as search_report
from tests.hostile import seeds
from tests.hostile.mutants import VALUES, Change, bytes_mutant, json_mutant, parts_mutant
from tests.hostile.targets import TARGETS

_NUMBERS = st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=5)
_UNITS = ("B", "kb", "KiB", "MB", "Gib", "GB", "TiB", "tb", "PB", "", "iB", "g b", "\u212ab", "GB\n")
_DIGITS = (
    "0", "7", "103", "9" * 70, "1e9", "-1", "+4", "0x1f", "１２", "٣", "1_000", "∞", "nan", " ", ".", "1.",
    ".5", "\x85", "",
)  # fmt: skip
_NAMES = (
    "a", "a/b", "../../x", "/etc/passwd", "-", "--", "\x1b[2J", "é" * 300, "x" * 5000, "\udcff", "\u2028",
    "none", "best", "a.gguf", "a.json", "out.html", "Q4_K", "Q4_K,Q9", ",,,", "http://x", "auto", "~", ".",
    "..",
)  # fmt: skip
_WILD = (*_NAMES, *(str(v).replace("\0", "") for v in VALUES), *(d + u for d in _DIGITS for u in _UNITS[::3]))

_COMMANDS = tuple(
    (first, [option for action in parser._actions for option in action.option_strings])
    for first, parser in (
        (["--budget", "1GB"], search.options.parser()),
        (["--model", "a.gguf", "--out", "b.gguf"], search.export.parser()),
        (["--study", "a"], search_report.parser()),
    )
)


def _changes(numbers: Sequence[int]) -> list[Change]:
    return [(n & 255, n >> 8 & 0xFFFF, n >> 24) for n in numbers]


def _both(exact: Callable[[list[Change]], bytes], raw: bytes) -> st.SearchStrategy[bytes]:
    """The format's own fields changed, or any bytes of it."""

    def made(numbers: list[int]) -> bytes:
        changes = _changes(numbers)
        return bytes_mutant(raw, changes) if numbers[0] >> 39 else exact(changes)

    return _NUMBERS.map(made)


def _arguments(numbers: list[int]) -> bytes:
    """Real options of a command with wild values."""
    command = numbers[0] % len(_COMMANDS)
    first, options = _COMMANDS[command]
    words = list(first) if numbers[0] & 64 else []
    for _, where, value in _changes(numbers):
        option, wild = options[where % len(options)], _WILD[value % len(_WILD)]
        words += ([option, wild], [f"{option}={wild}"], [option], [wild])[where >> 8 & 3]
    return bytes([command]) + b"\0".join(os.fsencode(w) for w in words)


def _sizes(numbers: list[int]) -> bytes:
    """A number and a unit, or what looks like them."""
    words = [(_DIGITS, _UNITS)[i % 2][n % len((_DIGITS, _UNITS)[i % 2])] for i, n in enumerate(numbers)]
    return "".join(words).encode()


_GGUF, _PIECES = seeds.gguf_parts(), seeds.sentencepiece_parts()
_FIRST = {name: target.seeds[0] for name, target in TARGETS.items()}

INPUTS: dict[str, st.SearchStrategy[bytes]] = {
    "safetensors": _both(
        lambda c: seeds.safetensors_file(json_mutant(seeds.SAFETENSORS, c)), _FIRST["safetensors"]
    ),
    "index": _both(lambda c: json_mutant(seeds.INDEX, c), _FIRST["index"]),
    "gguf": _both(lambda c: parts_mutant(_GGUF, c), _FIRST["gguf"]),
    "candidate": _both(lambda c: json_mutant(seeds.CANDIDATE, c), _FIRST["candidate"]),
    "sentencepiece": _both(lambda c: parts_mutant(_PIECES, c), _FIRST["sentencepiece"]),
    "size": st.one_of(_NUMBERS.map(_sizes), st.binary(max_size=80)),
    "arguments": _NUMBERS.map(_arguments),
}
