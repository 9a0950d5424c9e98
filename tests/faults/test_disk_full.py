"""A disk that fills up ends a search in one line; with room again, it ends as an undisturbed one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compression.files import atomic, write_text
from search.commands import outside_failure
from tests.faults.commands import Command, arguments, finish, leftovers, trials, winner
from tests.faults.conftest import Texts, Undisturbed
from tests.faults.disks import enlarge, fill, small_disk

LARGE = 400 * 2**20
PATIENCE = 400.0


def attempt(write: str, path: Path) -> None:
    """Writes two megabytes."""
    values = np.zeros(2**18)
    if write == "text":
        return write_text(path, "x" * 2**21)
    with atomic(path) as stream:
        np.save(stream, values) if write == "array" else np.savez(stream, a=values)


@pytest.mark.parametrize("write", ["text", "array", "archive"])
def test_a_file_that_has_no_room_is_named_and_does_not_exist(write: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        path = disk / "folder" / "file"
        write_text(path, "before")
        with pytest.raises(OSError, match="file") as caught:
            attempt(write, path)
        line = outside_failure(caught.value)
        assert line is not None
        assert line.startswith(f"{path}: ")
        assert "free space" in line
        assert [p for p in disk.rglob("*") if p.is_file()] == [path]
        assert path.read_text() == "before"


def told_trials(out: Path) -> int:
    """How many trials the journal tells of as ended."""
    file = out / "study.journal"
    return file.read_text("utf-8").count('"op_code":6') if file.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "calibration": lambda out: (out / "cache" / "windows-search.npz").exists(),
    "quantization": lambda out: len(list((out / "cache" / "bank").rglob("*.q"))) > 3,
    "option costs": lambda out: (out / "cache" / "option_costs.jsonl").exists(),
    "trials": lambda out: told_trials(out) > 2,
    "export": lambda out: (out / "winner").exists(),
}


def ends_in_one_line(command: Command, disk: Path) -> str:
    """The line a command ended with, which names the disk and what to do."""
    assert command.wait(PATIENCE) == 2, command.output()[-3000:]
    output = command.output()
    (line,) = [row for row in output.splitlines() if row.startswith("error:")]
    assert str(disk) in line, line
    assert "free space" in line, line
    assert "Traceback" not in output
    return line


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("moment", [*MOMENTS, "tracking"])
def test_a_search_goes_on_when_there_is_room_again(
    moment: str,
    tiny_checkpoint: Path,
    short: Texts,
    undisturbed: Undisturbed,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    expected, _ = undisturbed(0, "none")
    with small_disk(tmp_path / "disk", LARGE) as disk:
        out = tmp_path / "out" if moment == "tracking" else disk / "out"
        options = arguments(tiny_checkpoint, short, out, 0)
        if moment == "tracking":
            options += ["--tracking-uri", f"sqlite:///{disk / 'mlflow.db'}"]
        come = MOMENTS.get(moment, MOMENTS["trials"])
        command = Command(options, tmp_path / "first.log")
        try:
            while not come(out):
                assert command.lives(), command.output()[-3000:]
                assert time.monotonic() - command.started < PATIENCE
                time.sleep(0.002)
            fill(disk)
            ends_in_one_line(command, disk)
        finally:
            command.end()
        assert not leftovers(tmp_path)
        known = trials(out) if moment in ("trials", "export", "tracking") else []
        enlarge(disk, 2 * LARGE)
        seconds = finish(options, tmp_path / "second.log")
        assert trials(out) == trials(expected)
        assert known == trials(expected)[: len(known)]
        assert winner(out) == winner(expected)
    fault = {"fault": f"disk full during {moment}", "injected": 1, "lost": 0, "seconds": round(seconds, 1)}
    record_property("fault", json.dumps(fault))
