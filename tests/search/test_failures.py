"""A disk or a memory that fails is told in one line, whatever wraps it; a mistake of ours is not hidden."""

from __future__ import annotations

import errno
import os
import sqlite3

import optuna
import pytest
import sqlalchemy.exc

from search.commands import outside_failure, run_command

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/study.journal")


def wrapped(inner: BaseException, outer: Exception) -> Exception:
    """`outer`, raised because of `inner`."""
    outer.__cause__ = inner
    return outer


class ServerError(Exception):
    """Of a database's driver."""


def stored(inner: Exception) -> Exception:
    """What Optuna raises when a database fails."""
    outer = wrapped(inner, sqlalchemy.exc.OperationalError("INSERT", {}, inner))
    return wrapped(outer, optuna.exceptions.StorageInternalError("An exception is raised during the commit."))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (FULL, ("/data/study.journal: No space left", "free space there")),
        (wrapped(FULL, RuntimeError("storage")), ("/data/study.journal", "free space there")),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/data/x"), ("/data/x", "check the disk")),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/x"), ("/x", "check the path")),
        (
            wrapped(
                sqlite3.OperationalError("database or disk is full"),
                sqlalchemy.exc.OperationalError("INSERT", {}, Exception("x")),
            ),
            ("database or disk is full", "free space there"),
        ),
        (stored(sqlite3.OperationalError("database is locked")), ("database is locked)", "goes on where")),
        (
            stored(ServerError("server closed the connection unexpectedly\n\tThis probably means")),
            (") server closed the connection unexpectedly)", "goes on where"),
        ),
        (
            stored(ServerError('could not extend file "base/1/2": No space left on device\nHINT: Check')),
            ("No space left on device", "free space there"),
        ),
        (
            wrapped(ServerError("terminating connection"), optuna.exceptions.StorageInternalError("commit")),
            ("(terminating connection)", "run the same command again"),
        ),
        (
            sqlalchemy.exc.InterfaceError("SELECT 1", {}, ServerError("connection is closed")),
            ("connection is closed", "run the same command again"),
        ),
        (MemoryError(), ("out of memory", "--workers", "--stream yes")),
        (wrapped(MemoryError("4 GB"), RuntimeError("job")), ("out of memory (4 GB)",)),
    ],
)
def test_what_failed_outside_is_told_with_a_remedy(
    error: Exception, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), wrapped(FileNotFoundError(errno.ENOENT, "no", "/x"), KeyError("x")), RuntimeError("x")],
)
def test_mistakes_of_ours_are_shown_whole(error: Exception) -> None:
    def main() -> None:
        raise error

    assert outside_failure(error) is None
    with pytest.raises(type(error)):
        run_command(main)
