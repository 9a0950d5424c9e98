"""The study's journal: a file of one operation a line, which many drivers may append to.

The format is Optuna's own (`JournalFileBackend`), so that its tools read it. What differs is
what a killed driver or a full disk leaves behind: a line cut short is cut off before the next
one is written, and on a local disk the lock is the kernel's, which dies with its holder (Optuna's
lock files are waited for during 30 seconds). Network disks get Optuna's lock file made by an
exclusive open, as the kernel's locks do not hold between machines there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

NETWORK_DISKS = frozenset((
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs",
    "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs",
    "pvfs2", "smb2", "smb3", "smbfs", "virtiofs",
))  # fmt: skip
"""Kinds of file systems that other machines may write to at the same time."""

_DETAILS = frozenset((5, 7, 8, 9))  # a trial's parameters and attributes: the state after them is synced


class KernelLock:
    """`flock` on a file next to the journal; nothing that kills its holder leaves it locked."""

    def __init__(self, journal: str) -> None:
        self._file = journal + ".flock"
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._held = open(self._file, "ab")  # noqa: SIM115 - held until `release`
        fcntl.flock(self._held, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


class JournalFile(JournalFileBackend):
    """A journal in a file.

    Args:
        path: The file; made if there is none.
        network: Whether other machines write to it too; None: where its file system is a network's.
    """

    def __init__(self, path: Path, network: bool | None = None) -> None:
        if network is None:
            network = file_system(path) in NETWORK_DISKS
        self.lock = JournalFileOpenLock(str(path)) if network else KernelLock(str(path))
        super().__init__(str(path), self.lock)  # type: ignore[arg-type]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends whole lines or nothing.

        Raises:
            OSError: The disk is full or failing; the file is as it was.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._locked(), open(self._file_path, "r+b", buffering=0) as stream:
            end = whole_lines(stream)
            stream.truncate(end)
            stream.seek(end)
            try:
                written = stream.write(lines)
                if written != len(lines):  # the disk took a part: the rest tells why
                    stream.write(lines[written:])
                if any(log["op_code"] not in _DETAILS for log in logs):
                    os.fsync(stream.fileno())
            except OSError as error:
                stream.truncate(end)
                raise OSError(error.errno, error.strerror, self._file_path) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()


def whole_lines(stream: IO[bytes]) -> int:
    """Bytes of a file up to the end of its last whole line."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 2**16)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def file_system(path: Path) -> str:
    """Kind of the file system a path lies on, as the system's mount table names it; empty if unknown."""
    import psutil

    place = path.absolute().parent.resolve()
    best, kind = -1, ""
    for mount in psutil.disk_partitions(all=True):
        root = Path(mount.mountpoint)
        # Of several on one place, the last hides the others.
        if place.is_relative_to(root) and len(root.parts) >= best:
            best, kind = len(root.parts), mount.fstype
    return kind
