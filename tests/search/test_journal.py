"""The journal survives writers that die, disks that are full, and machines that share it."""

from __future__ import annotations

import fcntl
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from optuna.storages.journal import JournalFileOpenLock

from search.journal import JournalFile, KernelLock, file_system, whole_lines

LOG = {"op_code": 4, "study_id": 0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("torn", [b"{", b'{"op_code":4,"study', b"x" * 200_000])
def test_a_line_cut_short_is_cut_off_before_the_next_is_written(
    torn: bytes, network: bool, tmp_path: Path
) -> None:
    journal = JournalFile(tmp_path / "j", network)
    journal.append_logs([LOG, LOG])
    with (tmp_path / "j").open("ab") as stream:
        stream.write(torn)
    assert list(journal.read_logs(0)) == [LOG, LOG]
    journal.append_logs([{**LOG, "new": 1}])
    assert lines(tmp_path / "j") == [LOG, LOG, {**LOG, "new": 1}]
    assert list(journal.read_logs(2)) == [{**LOG, "new": 1}]


@pytest.mark.parametrize(
    ("content", "end"), [(b"", 0), (b"torn", 0), (b"a\n", 2), (b"a\nb", 2), (b"\n\n", 2)]
)
def test_whole_lines_end_at_the_last_newline(content: bytes, end: int, tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(content)
    with (tmp_path / "j").open("rb") as stream:
        assert whole_lines(stream) == end


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from search.journal import KernelLock; lock = KernelLock(sys.argv[1]); "
        "lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "j")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (tmp_path / "j.flock").open() as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    begun = time.monotonic()
    JournalFile(tmp_path / "j", network=False).append_logs([LOG])
    assert time.monotonic() - begun < 5


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "j", network=False)
    journal.append_logs([LOG] * 10)
    before = (tmp_path / "j").read_bytes()
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            journal.append_logs([LOG])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert error.value.filename == str(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before
    journal.append_logs([LOG])
    assert len(lines(tmp_path / "j")) == 11


@pytest.mark.parametrize(
    ("kind", "lock"), [("ext4", KernelLock), ("tmpfs", KernelLock), ("nfs4", JournalFileOpenLock)]
)
def test_network_disks_are_locked_by_a_file(
    kind: str, lock: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="nfs" if kind == "ext4" else "ext4"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert type(JournalFile(tmp_path / "j").lock) is lock


@pytest.mark.parametrize("kinds", [("autofs", "nfs4"), ("nfs4", "ext4")])
def test_of_two_mounts_on_one_place_the_last_is_seen(
    kinds: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [SimpleNamespace(mountpoint=str(tmp_path), fstype=kind) for kind in kinds]
    mounts.append(SimpleNamespace(mountpoint="/", fstype="tmpfs"))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert file_system(tmp_path / "j") == kinds[-1]
