"""Where a node keeps its copy of a study's files, and for how long.

    BASE/moefit-UID/KEY         the copy of one study; KEY hangs on the study's token
    BASE/moefit-UID/KEY.lock    held by every worker that uses it

A copy that nobody uses is removed: by the driver when it ends, else by the next worker on the node.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

from spaces.errors import UserError

NODE_CACHE = "MOEFIT_NODE_CACHE"
"""Environment variable of a node's Ray: the folder to use there."""

_MEMORY = Path("/dev/shm")
_SHARE = 0.5  # of the memory that is free: models of workers have to go there too


def base_folder(needed: int, token: str) -> Path:
    """The folder for copies: as the environment says, in shared memory if there is room, else temporary.

    Args:
        needed: Bytes that may come to lie there.
        token: Of the study; where another worker of the node keeps its copy, there it is.
    """
    import psutil

    user = f"moefit-{os.getuid()}"
    chosen = os.environ.get(NODE_CACHE)
    if chosen:
        return Path(chosen).absolute() / user
    memory, disk = _MEMORY / user, Path(tempfile.gettempdir()) / user
    for base in (memory, disk):
        if (base / _key(token)).is_dir():
            return base
    room = min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available) if _MEMORY.is_dir() else 0
    return memory if needed <= _SHARE * room else disk


def _own(base: Path) -> None:
    """Makes the folder, readable by this user alone.

    Raises:
        UserError: It cannot be made, or somebody else did.
    """
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = base.lstat()
        if base.is_symlink() or state.st_uid != os.getuid():
            raise OSError(f"belongs to user {state.st_uid}")
        base.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"{base}: cannot hold a copy of the study ({error.strerror or error}); set {NODE_CACHE} to a "
            "folder of your own on that node and start Ray there again"
        ) from error


class Place:
    """The folder of one study on this node, in use as long as this lives.

    Args:
        base: See `base_folder`.
        token: Of the study.
    """

    def __init__(self, base: Path, token: str) -> None:
        _own(base)
        for lock in base.glob("*.lock"):
            if lock.stem != _key(token):
                _remove_unused(lock)
        self._lock = (base / f"{_key(token)}.lock").open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self.folder = base / _key(token)
        self.folder.mkdir(exist_ok=True)


def _key(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def _taken(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _remove_unused(lock: Path) -> bool:
    """Removes a study's copy unless a worker uses it; whether it is gone."""
    with lock.open("ab") as stream:
        if _taken(stream):
            return False
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        return True


def remove(folder: Path, patience: float = 5.0) -> bool:
    """Removes the copy in `folder` once its workers have ended; whether they did in `patience` seconds."""
    end = time.monotonic() + patience
    while not (gone := _remove_unused(folder.with_suffix(".lock"))) and time.monotonic() < end:
        time.sleep(0.1)
    return gone
