"""How every command ends: 0 when it worked, one line and 2 on bad input, 130 when interrupted."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import sys
from collections.abc import Callable

from spaces.errors import UserError

_FULL = "free space there, then run the same command again: it goes on where it was"
_FAILING = "check the disk, then run the same command again: it goes on where it was"
_REMEDIES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL, errno.EIO: _FAILING}
_MORE_MEMORY = (
    "give fewer --workers, --stream yes or more memory, then run the same command again: it goes on where it "
    "was"
)
_SERVER_FULL = re.compile("No space left on device")
_SQLITE_FULL = re.compile("disk is full|disk I/O error|unable to open database file")
# torch's allocator has no error of its own.
_NO_MEMORY = re.compile("can't allocate memory|not enough memory")


def quiet_libraries() -> None:
    """Telemetry and chatter off, unless the user's environment says otherwise."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }.items():
        os.environ.setdefault(name, value)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function and exits the process."""
    quiet_libraries()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = outside_failure(error)
        if line is None:
            raise
        print(f"error: {UserError(line)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def outside_failure(error: BaseException) -> str | None:
    """One line on a disk or a memory that failed; None for an error that is this program's own."""
    if isinstance(error, OSError) and error.errno not in _REMEDIES:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; check the path, then run the same command again"
    return exhausted(error) or _storage_failure(error)


def _storage_failure(error: BaseException | None) -> str | None:
    """One line where a database failed, as one that is locked or whose server is gone, else None."""
    while error is not None:
        # By name, as commands that use no database should not load SQLAlchemy.
        if type(error).__name__ in ("StorageInternalError", "OperationalError", "InterfaceError"):
            cause = error.__cause__ or error
            text = next(iter(str(cause).splitlines()), "")[:200]
            return f"the study's storage failed ({text}); run the same command again: it goes on where it was"
        error = error.__cause__ or error.__context__
    return None


def exhausted(error: BaseException | None) -> str | None:
    """One line where a full or failing disk or too little memory is behind an error, else None.

    Libraries wrap what the system told them, so that causes are looked at too.
    """
    while error is not None:
        text = " ".join(str(error).split())[:200]
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
            return f"out of memory ({text or 'an allocation failed'}); {_MORE_MEMORY}"
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or text}; {_REMEDIES[error.errno]}"
        if type(error).__name__ == "OperationalError" and _SERVER_FULL.search(text):
            return f"the study's storage: {text}; {_FULL}"
        if isinstance(error, sqlite3.OperationalError) and _SQLITE_FULL.search(text):
            return f"SQLite: {text}; {_FULL}"
        error = error.__cause__ or error.__context__
    return None
