"""Nearly valid inputs: a valid one changed in a few places by a list of numbers that any fuzzer can draw."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

Change = tuple[int, int, int]
"""(what is done, where, with which value); each is taken modulo what there is."""

NUMBERS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 255, 256, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
           2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip

_RAW = {
    "@huge@": b"9" * 5000, "@long@": b"9" * 4000, "@deep@": b"[" * 3000 + b"]" * 3000, "@open@": b"[" * 9000,
    "@nan@": b"NaN", "@infinite@": b"-Infinity", "@overflow@": b"1e999", "@half@": b'"\\ud800"',
    "@comma@": b"1,", "@nothing@": b"", "@twice@": b'{"a": 1, "a": 2}', "@control@": b'"\\u001b[31m\\u0000"',
}  # fmt: skip
"""What json.dumps does not write, by the text that stands for it until it has written the rest."""

VALUES: tuple[Any, ...] = (
    *_RAW, *NUMBERS, -1, -(2**63), 1.5, 1e300, None, True, False, "", "F32", "Q4_K", "../../x", "a" * 3000,
    "é\u2028", [], [0], [-1, 0], [0, 2**64], [[]], {}, {"": 0}, {"a": {"a": []}},
)  # fmt: skip


def bytes_mutant(raw: bytes, changes: Sequence[Change]) -> bytes:
    """Bytes flipped, exchanged for numbers, taken out, said twice or cut off."""
    out = bytearray(raw)
    for what, where, value in changes:
        at = where % (len(out) + 1)
        number = NUMBERS[value % len(NUMBERS)]
        match what % 7:
            case 0 if at < len(out):
                out[at] ^= 1 << (value % 8)
            case 1:
                out[at : at + 8] = struct.pack("<Q", number)
            case 2:
                out[at : at + 4] = struct.pack("<I", number % 2**32)
            case 3:
                del out[at : at + 1 + value % 64]
            case 4:
                out[at:at] = out[at : at + 1 + value % 64]
            case 5:
                del out[at:]
            case 6:
                out[at:at] = bytes([value % 256]) * (1 + value % 16)
    return bytes(out)


def parts_mutant(parts: Sequence[bytes], changes: Sequence[Change]) -> bytes:
    """A binary format's fields, some exchanged (a number for another of its width), taken out or twice."""
    out = list(parts)
    for what, where, value in changes:
        at = where % len(out)
        number = NUMBERS[value % len(NUMBERS)]
        match what % 6:
            case 0 | 1 | 2 if len(out[at]) in (1, 2, 4, 8):
                width = len(out[at])
                out[at] = (number % 256**width).to_bytes(width, "little")
            case 3 if len(out) > 1:
                del out[at]
            case 4:
                out.insert(at, out[where * 7 % len(out)])
            case _:
                out[at] = bytes_mutant(out[at], [(value, where, value)])
    return b"".join(out)


def json_mutant(value: Any, changes: Sequence[Change]) -> bytes:
    """A JSON document with some values or names exchanged, as UTF-8."""
    value = copy.deepcopy(value)
    for what, where, number in changes:
        places = _places(value)
        new = copy.deepcopy(VALUES[number % len(VALUES)])
        if not places:
            value = new
            continue
        owner, key = places[where % len(places)]
        match what % 4:
            case 0 | 1:
                owner[key] = new
            case 2:
                del owner[key]
            case 3 if isinstance(owner, dict):
                owner[str(new)[:300]] = owner.pop(key)
    text = json.dumps(value, ensure_ascii=bool(len(changes) % 2)).encode("utf-8", "surrogatepass")
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"'.encode(), raw)
    return text


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything within a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        owner = waiting.pop()
        keys = (
            list(owner) if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()
        )
        for key in keys:
            found.append((owner, key))
            waiting.append(owner[key])
    return found
