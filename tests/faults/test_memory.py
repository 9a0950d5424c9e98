"""A worker's memory is what was planned for it, and one that runs out of it ends the search in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from search.commands import outside_failure
from search.options import REFERENCE_MODEL
from tests.faults.commands import ROOT, Command, arguments, finish, trials, winner
from tests.faults.conftest import Texts, Undisturbed

FACTOR = 1.5
"""How far the plan may be from the peak, either way."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", ["small", "reference"])
@pytest.mark.parametrize("way", ["hold", "stream"])
def test_a_worker_takes_what_was_planned(model: str, way: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint if model == "small" else REFERENCE_MODEL
    command = [
        sys.executable,
        "-m",
        "tests.faults.worker_peak",
        str(checkpoint),
        str(tmp_path / "cache"),
        way,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] / FACTOR < found["peak"] < FACTOR * found["planned"], found


def test_an_allocation_that_fails_is_told_in_one_line() -> None:
    import torch

    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        torch.empty(2**50, dtype=torch.uint8)
    line = outside_failure(caught.value)
    assert line is not None
    assert "out of memory" in line
    assert "--workers" in line
    assert "\n" not in line
    assert "out of memory" in (outside_failure(MemoryError()) or "")
    assert outside_failure(RuntimeError("a mistake of ours")) is None
    assert outside_failure(KeyError("so is this")) is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_without_memory_ends_the_search_which_goes_on(
    tiny_checkpoint: Path,
    short: Texts,
    undisturbed: Undisturbed,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    options = arguments(tiny_checkpoint, short, tmp_path / "out", 0)
    broken = Command(options, tmp_path / "first.log", "tests.faults.no_memory_run")
    try:
        assert broken.wait(500) == 2, broken.output()[-3000:]
    finally:
        broken.end()
    (line,) = [row for row in broken.output().splitlines() if row.startswith("error:")]
    assert "out of memory" in line
    assert "Traceback" not in broken.output()
    seconds = round(finish(options, tmp_path / "second.log"), 1)
    expected, _ = undisturbed(0, "none")
    assert trials(tmp_path / "out") == trials(expected)
    assert winner(tmp_path / "out") == winner(expected)
    fault = {"fault": "out of memory in a trial", "injected": 1, "lost": 0, "seconds": seconds}
    record_property("fault", json.dumps(fault))
