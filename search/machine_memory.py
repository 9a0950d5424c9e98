"""How much memory this process and its children may still take: of the machine, its container, its limits."""

from __future__ import annotations

import resource
from pathlib import Path

_NO_LIMIT = 2**60  # cgroup v1 writes a huge number for none


def free_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that can be taken without anything being swapped out or killed.

    Args:
        cgroups: Where control groups are mounted.
        own: Which of them this process is in.
    """
    import psutil

    return min([psutil.virtual_memory().available, *_of_groups(cgroups, own)])


def peak_resident() -> int:
    """The largest resident size of this process so far, bytes.

    Linux's VmHWM, proc(5): what getrusage(2) says begins with the peak of the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def address_space() -> int | None:
    """Bytes of addresses that every process may have (`ulimit -v`); None: as many as it likes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _of_groups(cgroups: Path, own: Path) -> list[int]:
    """What is left of the limit of each control group that holds this process, of version 1 or 2."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = cgroups / "memory" if kinds else cgroups
        names = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        inactive = "total_inactive_file" if kinds else "inactive_file"
        group = root / path.lstrip("/")
        # A container may see the host's path of its group, which is not there: its own is at the root.
        for folder in {root, *(g for g in (group, *group.parents) if g.is_relative_to(root))}:
            limit, used = (_number(folder / f"memory.{name}") for name in names)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                out.append(max(0, limit - used + _statistic(folder / "memory.stat", inactive)))
    return out


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none (`max`: no limit)."""
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    """A line of memory.stat; pages of files count as used, but are given back when they are wanted."""
    try:
        fields = dict(line.split() for line in file.read_text("ascii").splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0
