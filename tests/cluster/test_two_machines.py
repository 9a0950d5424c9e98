"""A study on two machines that share no disk, one of which is lost in the midst of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.network import Machines, refusal
from tests.faults.commands import Command, arguments, short_texts, trials, winner

DEADLINE = 420.0


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    reason = refusal()
    if reason is not None:
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    made = Machines(tmp_path)
    try:
        made.start_head()
        made.start_second()
        yield made
    finally:
        made.close()


def copies(machines: Machines) -> list[Path]:
    """The second machine's copies of studies, seen through one of its processes."""
    for pid in machines.pids(1):
        found = Path("/proc", str(pid), "root", "dev", "shm", "moefit-0")
        if found.is_dir():
            return [p for p in found.iterdir() if p.is_dir()]
    return []


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + DEADLINE
    while not what():
        assert process.poll() is None, log.read_text("utf-8")[-3000:]
        assert time.monotonic() < end, log.read_text("utf-8")[-3000:]
        time.sleep(0.2)


def count(out: Path) -> int:
    with suppress(Exception):  # the study is being made
        return len(trials(out))
    return 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_machine_lost_in_the_midst_of_a_study_changes_nothing(
    machines: Machines,
    tiny_checkpoint: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    short = short_texts(texts, tmp_path)
    alone = Command(arguments(tiny_checkpoint, short, tmp_path / "alone", 0), tmp_path / "alone.log")
    try:
        assert alone.wait(DEADLINE) == 0, alone.output()[-3000:]
    finally:
        alone.end()
    out, log = tmp_path / "out", tmp_path / "log"
    options = arguments(tiny_checkpoint, short, out, 2)
    command = [sys.executable, "-m", "tests.faults.quick_run", *options, "--ray-address", machines.address]
    process = machines.popen(0, command, log)
    # The second machine has fetched variants that it scores, and trials have been told.
    wait_for(lambda: any(True for c in copies(machines) for _ in c.glob("cache/bank/*/*.q")), process, log)
    wait_for(lambda: count(out) >= 4, process, log)
    (copy,) = copies(machines)
    for file in (tiny_checkpoint / "model.safetensors", out / "cache" / "calibration.npz"):
        place = "model" if file.parent == tiny_checkpoint else "cache"
        assert (copy / place / file.name).read_bytes() == file.read_bytes()
    assert len(list(copy.glob("cache/bank/*/*.q"))) < len(list(out.glob("cache/bank/*/*.q")))
    told, begun = count(out), time.monotonic()
    machines.lose(1)
    wait_for(lambda: count(out) > told, process, log)
    seconds = time.monotonic() - begun
    assert process.wait(DEADLINE) == 0, log.read_text("utf-8")[-3000:]
    assert re.search(r"goes on with 1 of 2 workers", log.read_text("utf-8"))
    assert trials(out) == trials(tmp_path / "alone")
    assert winner(out) == winner(tmp_path / "alone")
    fault = "a node without the study's disk taken off the net and killed in mid-study"
    record_property(
        "fault", json.dumps({"fault": fault, "injected": 1, "lost": 0, "seconds": round(seconds, 1)})
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_study_whose_cluster_dies_ends_in_one_line_and_goes_on_later(
    part: str, machines: Machines, tiny_checkpoint: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    short = short_texts(texts, tmp_path)
    out, log = tmp_path / "out", tmp_path / "log"
    options = arguments(tiny_checkpoint, short, out, 2)
    command = [sys.executable, "-m", "tests.faults.quick_run", *options, "--ray-address", machines.address]
    process = machines.popen(0, command, log)
    wait_for(lambda: count(out) >= 2, process, log)
    machines.kill(0, part)
    begun = time.monotonic()
    assert process.wait(120) == 2, log.read_text("utf-8")[-3000:]
    assert time.monotonic() - begun < 60
    last = log.read_text("utf-8").strip().splitlines()[-1]
    assert last.startswith("error: --ray-address")
    assert "run the same command again" in last
    machines.lose(0)
    machines.lose(1)
    machines.back(0)
    machines.back(1)
    machines.start_head()
    machines.start_second()
    again = machines.popen(0, command, log)
    assert again.wait(DEADLINE) == 0, log.read_text("utf-8")[-3000:]
    assert len(trials(out)) == 14
    assert copies(machines) == []
