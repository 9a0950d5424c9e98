"""A derived file is used only while its seal holds: no flipped bit, nothing made of something else."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from compression import sealed
from tests.compression.support import refused

MADE_OF = {"model": "abc", "quantizer": "ggml 1"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sealed.write(tmp_path / "scores.json", "[0.5, 0.25]", MADE_OF)
    return tmp_path / "scores.json"


def flip(path: Path, at: int) -> None:
    """Flips a bit, keeping the file's times: a disk that fails changes none."""
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_what_was_written_is_read(file: Path) -> None:
    assert sealed.read(file, MADE_OF) == "[0.5, 0.25]"
    assert sealed.read(file, {"model": "abc"}) == "[0.5, 0.25]"
    assert sealed.made_of(file) | MADE_OF == sealed.made_of(file)


def test_whoever_finds_a_file_finds_its_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write_text, found = tmp_path / "scores.json", sealed.write_text, []

    def looked_at(written: Path, text: str) -> None:
        write_text(written, text)
        if path.exists():
            found.append(sealed.read(path, MADE_OF))

    monkeypatch.setattr(sealed, "write_text", looked_at)
    sealed.write(path, "[0.5, \u00bd]", MADE_OF)
    assert found == ["[0.5, \u00bd]"]


@pytest.mark.parametrize("at", range(11))
def test_every_flipped_bit_of_a_file_is_found(file: Path, at: int) -> None:
    sealed.read(file, MADE_OF)  # known to be sound until then
    flip(file, at)
    refused(lambda: sealed.read(file, MADE_OF), file, "checksum", "run the search again")


def test_every_flipped_bit_of_a_seal_is_found(file: Path) -> None:
    seal = file.with_name("scores.json.seal")
    for at in range(len(seal.read_bytes()) - 1):  # but for the last newline, which says nothing
        flip(seal, at)
        refused(lambda: sealed.read(file, MADE_OF), file)
        flip(seal, at)
    assert sealed.read(file, MADE_OF)


def test_a_file_cut_short_is_found_before_it_is_mapped(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    refused(lambda: sealed.check(file, {}), file, "has 10 bytes where 11 were written")


def test_what_is_made_of_something_else_is_named(file: Path) -> None:
    refused(
        lambda: sealed.read(file, {"quantizer": "ggml 2"}), file, "another quantizer (ggml 1, now ggml 2)"
    )
    refused(lambda: sealed.read(file, {**MADE_OF, "text": "x"}), file, "another text (None, now x)")
    sealed.check(file, {"text": "x"}, every=False)
    refused(lambda: sealed.check(file, {"text": "x", "model": "b"}, every=False), file, "another model")


def test_another_format_is_made_anew(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "FORMAT", 2)
    refused(lambda: sealed.read(file, MADE_OF), file, "format 1, 2 is in use")


def test_a_file_without_a_seal_is_not_used(file: Path) -> None:
    file.with_name("scores.json.seal").unlink()
    refused(lambda: sealed.read(file, {}), file, "without a checksum")


def test_a_file_is_hashed_once_while_it_stays_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed.check(file, MADE_OF)
    monkeypatch.setattr(sealed.hashlib, "file_digest", lambda *args: pytest.fail("hashed again"))
    sealed.check(file, MADE_OF)


def test_a_disk_that_cannot_be_read_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sealed.hashlib, "file_digest", fail)
    refused(lambda: sealed.check(file, MADE_OF), file, "Input/output error", "check the disk")


def test_a_file_that_cannot_be_sealed_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (tmp_path / "x").write_text("made")
    monkeypatch.setattr(sealed, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        sealed.seal(tmp_path / "x", {})
    assert not list(tmp_path.iterdir())
