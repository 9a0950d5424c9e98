"""Gives a study's files to nodes that do not see the driver's disk, and takes the variants they quantized.

Runs as an actor on the driver's node. Every request stands alone, so that one may be sent twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Protocol

from compression.variant_bank import sound
from search.cluster.served import Served, is_variant
from spaces.errors import UserError

CHUNK = 32 * 2**20
"""Bytes of a request."""

Digest = tuple[int, str]
"""Bytes and SHA-256 of a file."""

_FORGOTTEN = 3600.0  # seconds
_TOKEN = re.compile("[0-9a-f]{32}")


class Files(Protocol):
    """What a mirror asks for, of `FileServer` or of its actor."""

    def listing(self) -> dict[str, Digest]:
        """Files that every worker needs, by name."""

    def describe(self, name: str) -> Digest:
        """Size and checksum of a file."""

    def read(self, name: str, offset: int) -> bytes:
        """At most `CHUNK` bytes of a file."""

    def write(self, name: str, token: str, offset: int, data: bytes) -> None:
        """Takes a part of a variant."""

    def finish(self, name: str, token: str, digest: Digest) -> None:
        """Puts a variant whose parts were all written into the bank."""

    def has(self, name: str, digest: Digest) -> bool:
        """Whether a variant lies in the bank."""


class FileServer:
    """Serves the files of `Served`.

    Args:
        served: What may be read and written.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self._known: dict[tuple[str, int, int, int], str] = {}
        self._lock = threading.Lock()
        for part in served.cache.glob("bank/*/.*.part"):
            if time.time() - part.stat().st_mtime > _FORGOTTEN:
                part.unlink(missing_ok=True)  # of a node that was lost as it sent

    def listing(self) -> dict[str, Digest]:
        """Checkpoint and stage files by name; each is hashed once while it stays as it is."""
        files = self.served.model_files() | self.served.stage_files()
        return {name: self._digest(path) for name, path in files.items()}

    def describe(self, name: str) -> Digest:
        """Size and checksum of a file.

        Raises:
            UserError: It is no file of the study, is missing, or is a damaged variant, which is removed.
        """
        path = self.served.path(name)
        if is_variant(name) and path.exists() and not sound(path):
            path.unlink(missing_ok=True)
            raise UserError(f"{path}: damaged, and removed; run the search again, which makes it anew")
        return self._digest(path)

    def _digest(self, path: Path) -> Digest:
        try:
            with path.open("rb") as stream, self._lock:
                state = os.fstat(stream.fileno())
                key = (str(path), state.st_ino, state.st_size, state.st_mtime_ns)
                if key not in self._known:
                    self._known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
                return state.st_size, self._known[key]
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, name: str, offset: int) -> bytes:
        """At most `CHUNK` bytes of a file from `offset` on."""
        path = self.served.path(name)
        try:
            with path.open("rb") as stream:
                stream.seek(offset)
                return stream.read(CHUNK)
        except OSError as error:
            raise _unreadable(path, error) from error

    def has(self, name: str, digest: Digest) -> bool:
        """Whether that very variant lies in the bank."""
        path = self.served.variant(name)
        return path.is_file() and self._digest(path) == digest

    def _part(self, name: str, token: str) -> Path:
        if not _TOKEN.fullmatch(token):
            raise UserError(f"{token!r}: not the name of a transfer; run the same command again")
        path = self.served.variant(name)
        return path.with_name(f".{path.name}.{token}.part")

    def write(self, name: str, token: str, offset: int, data: bytes) -> None:
        """Puts bytes at `offset` of a transfer called by 32 hexadecimal digits."""
        part = self._part(name, token)
        part.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as stream:
            stream.seek(offset)
            stream.write(data)

    def finish(self, name: str, token: str, digest: Digest) -> None:
        """Puts a transfer into the bank.

        Raises:
            UserError: What arrived is not what was sent.
        """
        part, path = self._part(name, token), self.served.variant(name)
        try:
            if not part.exists() and self.has(name, digest):
                return  # asked twice
            if self._digest(part) != digest or not sound(part):
                raise UserError(f"{path}: arrived damaged from a node; run the same command again")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror}); check the disk, then run the same command again"
    )
