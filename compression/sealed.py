"""Derived files that are verified before they are used: by a checksum, and by what they were made of.

The seal of FILE lies beside it as FILE.seal, JSON of

    format   number of this project's way of making such files; another one is made anew
    bytes, sha256   of FILE
    made_of  what the content hangs on, by name: {"model": fingerprint, "quantizer": version, ...}

A large file is written first, its seal after it: one that a crash left without a seal is not used. Of
texts, which another driver may look for at any moment, the seal is there first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from compression.files import write_text
from spaces.errors import MALFORMED, UserError

FORMAT = 1
"""To be raised when the same ingredients give other content."""

SUFFIX = ".seal"

_verified: set[tuple[str, int, int, int]] = set()


class UnsoundError(UserError):
    """A derived file that may not be used.

    Attributes:
        path: The file.
        reason: Why, without its name.
        stale: Whether it is whole, but of something else; it is damaged where not.
    """

    def __init__(self, path: Path, reason: str, stale: bool = False) -> None:
        self.path, self.reason, self.stale = path, reason, stale
        super().__init__(f"{path}: {reason}; run the search again, which makes it anew")

    def __reduce__(self) -> tuple[type[UnsoundError], tuple[Path, str, bool]]:
        """Lets it travel between processes."""
        return UnsoundError, (self.path, self.reason, self.stale)


def _seal_file(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def seal(path: Path, made_of: Mapping[str, str]) -> None:
    """Notes the checksum of a file that was just written, and what it was made of.

    Raises:
        OSError: The disk is full or failing; the file is gone then, as one without a seal is of no use.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
    try:
        _write_seal(path, size, digest, made_of)
    except OSError:
        path.unlink()
        raise


def _write_seal(path: Path, size: int, digest: str, made_of: Mapping[str, str]) -> None:
    about = {"format": FORMAT, "bytes": size, "sha256": digest, "made_of": dict(made_of)}
    write_text(_seal_file(path), json.dumps(about) + "\n")


def write(path: Path, text: str, made_of: Mapping[str, str]) -> None:
    """Writes a text file and its seal."""
    raw = text.encode("utf-8")
    _write_seal(path, len(raw), hashlib.sha256(raw).hexdigest(), made_of)
    write_text(path, text)


def read(path: Path, made_of: Mapping[str, str]) -> str:
    """The content of a text file whose seal holds.

    Raises:
        UnsoundError: It is damaged, or was made of something else.
    """
    check(path, made_of)
    return path.read_text("utf-8")


def made_of(path: Path) -> dict[str, str]:
    """What a file was made of by its seal, its own SHA-256 under `itself`; nothing where there is no seal."""
    try:
        about = json.loads(_seal_file(path).read_text("utf-8"))
        return {**{str(k): str(v) for k, v in about["made_of"].items()}, "itself": str(about["sha256"])}
    except MALFORMED:
        return {}


def check(path: Path, made_of: Mapping[str, str], every: bool = True) -> None:
    """Verifies a file: its length, its checksum (once per process while it stays as it is), its making.

    Args:
        path: The file.
        made_of: What it has to be made of.
        every: Whether its seal has to name all of `made_of`; without, what it does not name is not compared.

    Raises:
        UnsoundError: It is damaged, or was made of something else.
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            about = _about(path)
            _compare(path, about, made_of, every)
            state = path.stat()
            if state.st_size != about["bytes"]:
                raise UnsoundError(
                    path, f"damaged (has {state.st_size:,} bytes where {about['bytes']:,} were written)"
                )
            known = (str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns)
            if known in _verified:
                return
            if hashlib.file_digest(stream, "sha256").hexdigest() != about["sha256"]:
                raise UnsoundError(path, "damaged (its checksum does not hold)")
            _verified.add(known)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the disk, then run the search again"
        ) from error


def _about(path: Path) -> dict[str, object]:
    """The seal's fields, of their kinds."""
    file = _seal_file(path)
    if not file.exists():
        raise UnsoundError(path, "without a checksum (made by an earlier version, or cut short)", True)
    raw = file.read_bytes()
    try:
        about = json.loads(raw)
        fields = int, int, str, dict
        kinds = [type(about[name]) for name in ("format", "bytes", "sha256", "made_of")]
        if kinds != list(fields):
            raise TypeError(f"fields are {kinds}")
    except MALFORMED as error:
        raise UnsoundError(path, f"damaged (its seal {file.name} is)") from error
    out: dict[str, object] = about
    return out


def _compare(path: Path, about: Mapping[str, object], made_of: Mapping[str, str], every: bool) -> None:
    if about["format"] != FORMAT:
        raise UnsoundError(path, f"of format {about['format']}, {FORMAT} is in use", True)
    found = about["made_of"]
    assert isinstance(found, dict)
    for name, wanted in made_of.items():
        if found.get(name) != wanted and (every or name in found):
            was = f"of another {name} ({_short(found.get(name))}, now {_short(wanted)})"
            raise UnsoundError(path, was, True)


def _short(value: object) -> str:
    """A digest's first letters; a version in full."""
    text = str(value)
    return text if " " in text or len(text) <= 16 else text[:16]


def remove(path: Path) -> None:
    """Removes a file and its seal."""
    path.unlink(missing_ok=True)
    _seal_file(path).unlink(missing_ok=True)
