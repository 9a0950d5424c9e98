"""Files that are either whole or absent: written to a temporary name, then renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

_PART = ".part"
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None)
_FOREIGN = f"(os error {errno.ENOSPC})"  # how the tokenizers library, which is Rust, tells of a full disk


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream that becomes `path` when the block ends without an error.

    Raises:
        OSError: The disk is full or failing; it names `path`, which is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_part(path) as (temporary, stream):
        yield stream
        locked = os.dup(stream.fileno())
        try:
            stream.close()
            os.replace(temporary, path)
        finally:
            os.close(locked)


@contextmanager
def locked_part(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file beside `path` to be given that name, opened to be written; removed at the end of the block.

    Its writer holds it locked, so that `remove_parts` can tell what a killed process left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{_PART}")
    try:
        with naming(path, temporary), _open_locked(temporary) as stream:
            yield temporary, stream
    finally:
        temporary.unlink(missing_ok=True)


def _open_locked(path: Path) -> IO[bytes]:
    while True:
        stream = path.open("wb")
        with suppress(OSError):  # a disk without locks, where nobody else removes parts either
            fcntl.flock(stream, fcntl.LOCK_EX)
        if path.exists():
            return stream
        stream.close()  # somebody removed it between the two


@contextmanager
def locked_folder(path: Path) -> Iterator[Path]:
    """As `locked_part`, of a folder; its files belong to nobody else."""
    folder, handle = _make_locked(path)
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _make_locked(path: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(_PART, f".{path.name}.", path.parent))
        with suppress(FileNotFoundError):  # somebody removed it before it was locked
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)


def remove_parts(folder: Path, of: str | None = None) -> None:
    """Removes what killed processes left unfinished.

    Args:
        folder: Files and folders below it.
        of: Only those right in the folder that were to become a file of this name.
    """
    left = folder.rglob(f".*{_PART}") if of is None else folder.glob(f".{glob.escape(of)}.*{_PART}")
    for path in [*left]:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)  # SQLite's
            finally:
                os.close(handle)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Lets errors of a full or failing disk name what was to be written or read.

    Writes to an open file do not say which; numpy's not even why.

    Args:
        path: What the block writes or reads.
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
    with naming(path):
        out = np.fromfile(path, np.uint8, size, offset=offset)
        if len(out) < size:  # numpy does not say whether the file ended or the disk failed
            with path.open("rb", buffering=0) as stream:
                stream.seek(offset + len(out))
                stream.read(1)
    return out


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic(path) as stream:
        stream.write(text.encode("utf-8"))
