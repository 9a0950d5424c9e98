"""A module of this project run in a process of its own, for what may abort or be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_KEPT = 2**16  # bytes of error output, its last


def run_module(module: str, argument: str, timeout: float) -> tuple[int, str]:
    """Exit code and the end of the error output of `python -m module argument`.

    Raises:
        subprocess.TimeoutExpired: It took longer than `timeout` seconds; it is killed.
    """
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *([inherited] if inherited else [])]),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow down a shared machine
        "GGML_NO_BACKTRACE": "1",  # on an abort ggml would start a debugger
        "RUST_BACKTRACE": "0",
    }
    # -P: without it a folder in the current directory could stand in for this package.
    command = [sys.executable, "-P", "-m", module, argument]
    with tempfile.TemporaryFile() as errors:  # not a pipe: a child may write more than memory holds
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        ) as child:
            _offer_to_be_killed(child.pid)
            try:
                code = child.wait(timeout)
            except BaseException:
                child.kill()
                raise
        size = errors.seek(0, os.SEEK_END)
        errors.seek(max(0, size - _KEPT))
        return code, errors.read().decode(errors="replace").strip()


def _offer_to_be_killed(process: int) -> None:
    """Where memory runs out, Linux is to end the child and not this process or a stranger's."""
    with suppress(OSError):  # other systems have no such file
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")
