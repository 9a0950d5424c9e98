"""Work that only one driver of a folder does at a time: the others wait, and find it done."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search.console import console


@contextmanager
def alone(file: Path, doing: str) -> Iterator[None]:
    """Holds `file` locked for the length of the block; the kernel lets go of it when its holder dies.

    Args:
        file: The lock; made if there is none, and left there.
        doing: What the holder does, for the line that a waiting driver prints.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"another driver of {file.parent} is {doing}: waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
