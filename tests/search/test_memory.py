"""What does not fit into memory is told before a worker starts, with what would fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from search import machine_memory, memory
from search.machine_memory import free_memory, peak_resident
from search.memory import make_plan, run_bytes, streams, worker_bytes
from search.options import parse
from tests.compression.support import refused
from tests.spaces import tiny

MODEL = tiny.inventory(num_hidden_layers=4)
GB = 10**9

Free = Callable[[int], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Sets the bytes that are free."""
    monkeypatch.setattr(memory, "address_space", lambda: None)
    return lambda size: monkeypatch.setattr(memory, "free_memory", lambda: size)


def room(workers: int, stream: bool) -> int:
    """Bytes free that so many workers just fit into."""
    return int(run_bytes(MODEL, workers, stream) / memory._SHARE) + 1


def test_workers_that_fit_hold_the_model_and_keep_what_is_left(free: Free) -> None:
    free(100 * GB)
    plan = make_plan(MODEL, 2)
    assert (plan.workers, plan.stream) == (2, False)
    assert plan.cache_bytes > 0
    assert run_bytes(MODEL, 2, False, plan.cache_bytes) < 100 * GB
    free(room(2, False))
    assert make_plan(MODEL, 2).cache_bytes < plan.cache_bytes


def test_too_many_workers_are_told_how_many_would_fit(free: Free) -> None:
    free(room(3, False))
    assert make_plan(MODEL, 3, "no").workers == 3
    refused(lambda: make_plan(MODEL, 4, "no"), "--workers 4", "give --workers 3", "are free")
    free(room(0, True) // 2)
    refused(lambda: make_plan(MODEL, 2), "--workers 2", "close other programs")
    free(room(0, True))
    refused(lambda: make_plan(MODEL, 1), "--workers 1", "give --workers 0")


def test_a_model_that_is_not_held_is_streamed(free: Free, capsys: pytest.CaptureFixture[str]) -> None:
    large = tiny.inventory(num_hidden_layers=400)
    assert worker_bytes(large, True) < worker_bytes(large, False)
    free(int(run_bytes(large, 2, True) / memory._SHARE) + 1)
    plan = make_plan(large, 2)
    assert (plan.workers, plan.stream, plan.cache_bytes) == (2, True, 0)
    assert "streamed from disk" in capsys.readouterr().out
    assert streams("auto", large, 2)
    assert not streams("no", large, 2)
    refused(lambda: make_plan(large, 2, "no"), "--stream yes")


def test_workers_nobody_asked_for_are_fewer_with_a_line(
    free: Free, capsys: pytest.CaptureFixture[str]
) -> None:
    free(room(2, False))
    assert make_plan(MODEL, 8, fewer=True).workers == 2
    assert "2 workers instead of 8" in capsys.readouterr().out
    assert parse(["--budget", "1GB"]).fewer_workers
    assert not parse(["--budget", "1GB", "--workers", "2"]).fewer_workers


def test_workers_elsewhere_are_not_refused(free: Free) -> None:
    free(1)
    assert make_plan(MODEL, 4, elsewhere=True).workers == 4
    assert not make_plan(MODEL, 4, "no", elsewhere=True).stream


def test_a_study_stays_streamed_or_held_as_it_was_begun(
    free: Free, capsys: pytest.CaptureFixture[str]
) -> None:
    free(100 * GB)
    assert not make_plan(MODEL, 2).stream
    assert make_plan(MODEL, 2, begun=True).stream
    assert make_plan(MODEL, 2, "yes", begun=True).stream
    assert not make_plan(MODEL, 2, "no", begun=False).stream
    assert make_plan(MODEL, 2, elsewhere=True, begun=True).stream
    for stream, begun in (("yes", False), ("no", True)):
        refused(lambda: make_plan(MODEL, 2, stream, begun=begun), f"--stream {stream}", "--study")  # noqa: B023


def test_a_held_study_is_not_told_to_stream(free: Free) -> None:
    large = tiny.inventory(num_hidden_layers=400)
    free(int(run_bytes(large, 2, True) / memory._SHARE) + 1)
    assert make_plan(large, 2).stream
    assert "--stream" not in refused(lambda: make_plan(large, 2, begun=False), "--workers 2", "are free")
    free(int(run_bytes(large, 1, False) / memory._SHARE) + 1)
    refused(lambda: make_plan(large, 2, begun=False), "give --workers 1")
    assert not make_plan(large, 2, fewer=True, begun=False).stream


def test_a_limit_of_addresses_is_named(free: Free, monkeypatch: pytest.MonkeyPatch) -> None:
    free(100 * GB)
    monkeypatch.setattr(memory, "address_space", lambda: 2 * GB)
    refused(lambda: make_plan(MODEL, 1), "--workers 1", "ulimit -v", "raise the limit")
    monkeypatch.setattr(memory, "address_space", lambda: 40 * GB)
    assert make_plan(MODEL, 1).workers == 1


def group(folder: Path, limit: str, used: int, names: tuple[str, str], stat: str) -> None:
    folder.mkdir(parents=True)
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{stat} 100\n")


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    assert free_memory(tmp_path, own) > 1000
    group(tmp_path / "fs" / "a" / "b", "max", 700, ("max", "current"), "inactive_file")
    assert free_memory(tmp_path / "fs", own) > 1000
    (tmp_path / "fs" / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "fs" / "a" / "memory.current").write_text("800\n")
    assert free_memory(tmp_path / "fs", own) == 200
    (tmp_path / "fs" / "a" / "b" / "memory.max").write_text("750\n")
    assert free_memory(tmp_path / "fs", own) == 150  # pages of files are given back


def test_the_limit_of_an_older_container_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("5:cpu:/x\n4:memory,hugetlb:/docker/1\n")
    names = "limit_in_bytes", "usage_in_bytes"
    group(tmp_path / "memory", str(2**63 - 4096), 0, names, "total_inactive_file")
    assert free_memory(tmp_path, own) > 1000
    # The host's path is not there: what counts is at the root of what the container sees.
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000")
    assert free_memory(tmp_path, own) == 5100


def test_no_limit_where_nothing_says_so(tmp_path: Path) -> None:
    assert machine_memory._of_groups(tmp_path, tmp_path / "none") == []


def test_the_peak_is_not_that_of_whoever_started_a_process() -> None:
    held = bytearray(400 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    assert peak_resident() > len(held)
    code = "from search.machine_memory import peak_resident; print(peak_resident())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < 200 * 2**20
