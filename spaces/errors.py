"""The one exception a command turns into a single line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a file of the wrong form can raise."""


_LONGEST, _END = 480, 160  # characters of a message, and how many of them are its last


class UserError(ValueError):
    """Bad input. The message names the file or option, the rule and a remedy, on one line.

    It quotes what a file says, so what a terminal would act on is written as escapes, and the middle of a
    message longer than 480 characters is left out: its start names the file, its end the remedy.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - _END - 5]} ... {line[-_END:]}"
        super().__init__(line)


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not among `known`, with the nearest suggestion.

    Args:
        kind: What the name stands for, as a user would say it (`device`, `--sampler`).
        name: What was given.
        known: Every accepted name.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
