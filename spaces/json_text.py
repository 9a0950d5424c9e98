"""JSON that others wrote: refused where it is large, deep or says something twice."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28
"""Of a JSON file; tokenizers, the largest there are, take some tens of MB."""


def read_text(file: Path, limit: int = MAX_BYTES) -> str:
    """A regular file's text, UTF-8, of at most `limit` bytes.

    Raises:
        ValueError: No regular file, which a pipe or a device would make endless, too large, or not UTF-8.
        OSError: It cannot be read.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    if status.st_size > limit:
        raise ValueError(f"{status.st_size} bytes, more than the {limit} taken here")
    return file.read_text("utf-8")


def parse_once(text: str) -> Any:
    """Parses JSON in which no object names a field twice, of which readers differ in what they take.

    Raises:
        ValueError: Not JSON, a field named twice, or text that is no Unicode.
        RecursionError: Nested deeper than Python's stack allows.
    """
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} stands twice")
    for name in found:
        name.encode()  # half of a surrogate pair is no character
    return found
