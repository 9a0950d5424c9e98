"""Processes by more than their number, which the system gives to a new one when the old one is gone."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import psutil


def place() -> str:
    """A machine since its last start, and the processes that can be seen there (containers see their own)."""
    parts = [platform.node()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(source) if source.endswith("pid") else Path(source).read_text().strip())
    return " ".join(parts)


def started(pid: int) -> float | None:
    """When a process of this place was started, by a clock that nobody sets; None if it is no more.

    Linux counts ticks since the machine's start (field 22 of /proc/PID/stat, proc(5)); a wall clock would
    move with every correction.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (ProcessLookupError, IndexError, ValueError):
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == "zombie" else process.create_time()
    except psutil.Error:
        return None
