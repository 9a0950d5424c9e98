"""Files that are either whole or absent: written to a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None)
_FOREIGN = f"(os error {errno.ENOSPC})"  # how the tokenizers library, which is Rust, tells of a full disk


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream that becomes `path` when the block ends without an error.

    Raises:
        OSError: The disk is full or failing; it names `path`, which is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with naming(path, temporary):
            with temporary.open("wb") as stream:
                yield stream
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Lets errors of a full or failing disk name what was to be written.

    Writes to an open file do not say which; numpy's not even why.

    Args:
        path: What the block writes.
        temporary: The name it has until it is finished.
    """
    try:
        yield
    except OSError as error:
        if temporary is not None and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        if error.errno in _UNWRITTEN and error.filename is None:
            reason = error.strerror or f"could not be written in full ({error})"
            raise OSError(error.errno or errno.ENOSPC, reason, str(path)) from error
        raise
    except Exception as error:
        if _FOREIGN in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def read_part(path: Path, offset: int, size: int) -> np.ndarray:
    """Some bytes of a file, as uint8; fewer where it ends before.

    Not mapped, as a process ends without a word where a mapped file cannot be read or got shorter.

    Raises:
        OSError: It cannot be read; with the file's name.
    """
    out = np.empty(size, np.uint8)
    done = 0
    with naming(path), path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while done < size and (count := stream.readinto(out[done:].data)):
            done += count
    return out[:done]


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic(path) as stream:
        stream.write(text.encode("utf-8"))
