"""A checkpoint's tokenizer tried in a process of its own before this one loads it.

The tokenizers library is native code. What a tokenizer.json says can make it panic, ask for
more memory than there is, which ends the process, or search with a regular expression for ever.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
from functools import cache
from pathlib import Path

from compression.child import run_module
from spaces.errors import UserError

_SECONDS = 120


def try_tokenizer(file: Path) -> None:
    """Loads a tokenizer.json, or a folder by its tokenizer.model, and tokenizes some texts.

    Once per process for the same bytes.

    Raises:
        UserError: It does not load, or tokenizing fails, ends the process or takes too long.
    """
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    failure = _failure(file.resolve(), digest)
    if failure is not None:
        raise UserError(f"{file.parent}: its tokenizer cannot be loaded ({failure}); download it again")


@cache
def _failure(file: Path, digest: str) -> str | None:
    """What is wrong with the tokenizer, None where nothing is; `digest` stands for the file's bytes."""
    try:
        code, stderr = run_module("compression.tokenizer_child", str(file), _SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done with {_SECONDS} s of loading and tokenizing some texts"
    if not code:
        return None
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if code < 0:
        reason = f": {lines[0][:200]}" if lines else ""
        return f"it ends the process by {signal.Signals(-code).name}{reason}"
    return lines[-1] if lines else f"exit code {code}"
