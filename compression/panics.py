"""Panics of libraries written in Rust, which reach Python as exceptions that are no `Exception`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PanicError(RuntimeError):
    """A library written in Rust gave up."""


@contextmanager
def panics_raised() -> Iterator[None]:
    """Within the block a panic is raised as a `PanicError`, so that it is handled as other failures are."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 makes the class anew for each library
            raise
        raise PanicError(f"the library panicked: {error}") from error
