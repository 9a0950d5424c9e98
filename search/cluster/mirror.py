"""The files of a study on a node that does not see the driver's disk: one copy, whoever asks for it.

They lie in a folder of the node's own under the names of `search.cluster.served`. Workers of the
node read the same files, mapped, so that a node holds each of them in memory once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from compression.files import atomic, write_text
from search.cluster.file_server import CHUNK, Digest, Files
from spaces.errors import MALFORMED, UserError

_TRIES = 3


class _ChangedError(Exception):
    """What arrived is not what was announced: the file was replaced, or damaged on the way."""


class Mirror:
    """Copies files of a study on first use, and again when they change.

    Args:
        folder: Where they go on this node.
        files: Where they come from.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self.files = folder, files

    def refresh(self) -> None:
        """Makes checkpoint and stage files what they are at the driver.

        Raises:
            UserError: The node has no room, or files keep changing.
        """
        listing = self.files.listing()
        for name, digest in listing.items():
            self._ensure(name, digest)
        for path in self.folder.glob("cache/[!.]*"):
            if path.is_file() and f"cache/{path.name}" not in listing:
                path.unlink(missing_ok=True)  # removed at the driver, to be made anew

    def fetch(self, path: Path) -> None:
        """Copies a variant of the bank to where a worker looks for it, if it is not there yet."""
        name = path.relative_to(self.folder).as_posix()
        self._ensure(name, self.files.describe(name))

    def send(self, path: Path) -> None:
        """Brings a variant that was made here into the driver's bank; the node keeps no copy.

        A node is to hold what it scores, which most variants are not.
        """
        name = path.relative_to(self.folder).as_posix()
        with path.open("rb") as stream:
            digest = (os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())
            if not self.files.has(name, digest):
                token, offset = os.urandom(16).hex(), 0
                stream.seek(0)
                while data := stream.read(CHUNK):
                    self.files.write(name, token, offset, data)
                    offset += len(data)
                self.files.finish(name, token, digest)
        path.unlink(missing_ok=True)

    def _place(self, name: str) -> Path:
        """Where a name's copy lies; a name that would lead elsewhere is refused."""
        parts = PurePosixPath(name).parts
        if not parts or parts[0] not in ("model", "cache") or ".." in parts:
            raise UserError(f"{name}: not a name of a file of a study; run the same command again")
        return self.folder.joinpath(*parts)

    def _ensure(self, name: str, digest: Digest) -> None:
        path = self._place(name)
        for _ in range(_TRIES):
            try:
                with _locked(path.with_name(f".{path.name}.lock")):
                    if not _is(path, digest):
                        self._copy(name, digest, path)
                return
            except _ChangedError:
                digest = self.files.describe(name)
            except OSError as error:
                raise UserError(
                    f"node {socket.gethostname()}: {path}: {error.strerror or error}; set MOEFIT_NODE_CACHE "
                    "there to a folder with room, start its Ray again, then run the same command again"
                ) from error
        raise UserError(f"{name}: changed or arrived damaged {_TRIES} times; run the same command again")

    def _copy(self, name: str, digest: Digest, path: Path) -> None:
        size, wanted = digest
        found, done = hashlib.sha256(), 0
        with atomic(path) as stream:
            while done < size and (data := self.files.read(name, done)):
                found.update(data)
                stream.write(data)
                done += len(data)
            if found.hexdigest() != wanted:
                raise _ChangedError
            os.fchmod(stream.fileno(), 0o444)
        write_text(_note(path), json.dumps([*_state(path), wanted]))


def _note(path: Path) -> Path:
    """Beside a copy: its state on disk when its checksum was found to hold."""
    return path.with_name(f".{path.name}.checked")


def _state(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _is(path: Path, digest: Digest) -> bool:
    """Whether a copy is the file that was announced, by what was noted when it was checked."""
    try:
        known = json.loads(_note(path).read_text("utf-8"))
        return bool(known == [*_state(path), digest[1]] and known[1] == digest[0])
    except MALFORMED:
        return False


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process of the node at a time; the kernel lets go when it dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
