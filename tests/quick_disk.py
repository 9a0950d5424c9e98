"""A folder in memory, for tests of who writes what and when: not of the disk, which is slow to sync."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")


@contextmanager
def quick_folder(otherwise: Path) -> Iterator[Path]:
    """A new folder in memory, removed at the end; `otherwise` where the system has no such place."""
    if not _MEMORY.is_dir():
        yield otherwise
        return
    made = Path(tempfile.mkdtemp(dir=_MEMORY))
    try:
        yield made
    finally:
        shutil.rmtree(made)
