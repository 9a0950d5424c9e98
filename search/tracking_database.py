"""MLflow's SQLite file, made in one piece.

MLflow makes its tables by some thirty migrations, one after the other, and cannot go on where a killed
process left them. So a new file is made beside its place and put there when it is whole.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

_ABANDONED = 3600.0  # seconds since a file was written to that nobody finishes any more


def make_database(uri: str) -> None:
    """Makes the database of a `sqlite:///FILE` that is not there yet; does nothing for other URIs.

    Raises:
        OSError: The file cannot be written.
        MlflowException, SQLAlchemyError: MLflow cannot make its tables.
    """
    path = _file(uri)
    if path is None or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import make_url

    for old in path.parent.glob(f".{path.name}.*.part*"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _ABANDONED:
                old.unlink()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        url = make_url(uri).set(database=str(part)).render_as_string(hide_password=False)
        SqlAlchemyStore(url, "./mlruns").engine.dispose()
        _place(part, path)
    finally:
        for rest in path.parent.glob(f"{part.name}*"):  # SQLite's own journal too
            rest.unlink(missing_ok=True)


def _file(uri: str) -> Path | None:
    """The file behind a URI of SQLite."""
    from sqlalchemy.engine import make_url

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
