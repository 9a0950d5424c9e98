"""A module of this project run in a process of its own, for what may abort or be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def run_module(module: str, argument: str, timeout: float) -> tuple[int, str]:
    """Exit code and error output of `python -m module argument`.

    Raises:
        subprocess.TimeoutExpired: It took longer than `timeout` seconds; it is killed.
    """
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *([inherited] if inherited else [])]),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow down a shared machine
        "GGML_NO_BACKTRACE": "1",  # on an abort ggml would start a debugger
    }
    # -P: without it a folder in the current directory could stand in for this package.
    command = [sys.executable, "-P", "-m", module, argument]
    child = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout
    )
    return child.returncode, child.stderr.decode(errors="replace").strip()
