"""Files that are either whole or absent: written to a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None)


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream that becomes `path` when the block ends without an error.

    Raises:
        OSError: The disk is full or failing; it names `path`, which is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with temporary.open("wb") as stream:
            yield stream
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        # Writes to an open file do not say which; numpy's not even why.
        if error.errno in _UNWRITTEN and error.filename is None:
            raise OSError(error.errno or errno.ENOSPC, _reason(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return error.strerror or f"could not be written in full ({error})"


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic(path) as stream:
        stream.write(text.encode("utf-8"))
