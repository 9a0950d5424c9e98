"""SQLite files, made in one piece.

MLflow makes its tables by some thirty migrations, Optuna one after the other, and neither goes on where a
killed process left them. So a new file is made beside its place and put there when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from sqlalchemy.engine import make_url

from compression.files import locked_part


def make_database(uri: str, make: Callable[[str], None]) -> None:
    """Makes the database of a `sqlite:///FILE` that is not there yet; does nothing for other URIs.

    Args:
        uri: Of the database.
        make: Makes the tables of the URI it is given, and leaves no connection open.

    Raises:
        OSError: The file cannot be written.
    """
    path = _file(uri)
    if path is None or path.exists() or not path.parent.is_dir():
        return
    with locked_part(path) as (part, _):
        try:
            make(make_url(uri).set(database=str(part)).render_as_string(hide_password=False))
            _place(part, path)
        finally:
            part.with_name(f"{part.name}-journal").unlink(missing_ok=True)


def _file(uri: str) -> Path | None:
    """The file behind a URI of SQLite."""
    if not urlparse(uri).scheme.startswith("sqlite"):
        return None
    name = make_url(uri).database
    return Path(name) if name and name != ":memory:" and not name.startswith("file:") else None


def _place(part: Path, path: Path) -> None:
    """Gives a file its name, unless another driver was first."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a disk without links
        if not path.exists():
            os.replace(part, path)
