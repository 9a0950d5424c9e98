"""kill -9 of the driver, a worker or Ray's raylet at any moment changes nothing in how a search ends."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.commands import Command, arguments, leftovers, logged, trials, winner
from tests.faults.conftest import Texts, Undisturbed


def same(out: Path, expected: Path) -> None:
    assert trials(out) == trials(expected)
    assert winner(out) == winner(expected)
    assert logged(out) == list(range(len(trials(expected))))
    assert not leftovers(out / "winner")


Kill = Callable[[Command, random.Random], bool]
"""Kills a process of a search; says whether there was one."""


def kill_driver(command: Command, rng: random.Random) -> bool:
    command.kill()
    return True


def kill_worker(command: Command, rng: random.Random) -> bool:
    agents = {p.pid for p in command.called("Agent")}
    workers = [p for p in command.called("ray::") if p.pid not in agents]
    if workers:
        rng.choice(workers).kill()
    return bool(workers)


def kill_raylet(command: Command, rng: random.Random) -> bool:
    raylets = command.called("raylet")
    for raylet in raylets:
        raylet.kill()
    return bool(raylets)


def disturbed(
    arguments: list[str], folder: Path, kill: Kill, moments: list[float], rng: random.Random
) -> list[float]:
    """Runs a search that is hit at every one of the moments (seconds after a start, or after the last blow).

    Returns:
        Seconds from each blow until a trial, a file or a stage showed that work went on.
    """
    command, recovered, log = Command(arguments, folder / "log"), [], folder / "log"
    try:
        for moment in moments:
            deadline = time.monotonic() + moment
            while command.lives() and time.monotonic() < deadline:
                time.sleep(0.05)
            while command.lives() and not kill(command, rng):
                time.sleep(0.01)
            if command.process.poll() == 0:
                break  # it was done before
            begun, before = time.monotonic(), newest(folder / "out")
            settle = begun + 15.0
            while command.lives() and newest(folder / "out") == before and time.monotonic() < settle:
                time.sleep(0.1)
            if not command.lives() and command.process.returncode != 0:
                command = Command(arguments, log)  # the same command again
            while command.lives() and newest(folder / "out") == before:
                time.sleep(0.1)
            recovered.append(time.monotonic() - begun)
        while command.wait() != 0:
            if kill is not kill_raylet or len(recovered) > 40:
                raise AssertionError(command.output()[-3000:])
            command = Command(arguments, log)
    finally:
        command.end()
    return recovered


def newest(out: Path) -> float:
    """When the newest file of a folder was written."""
    times = [0.0]
    for path in out.rglob("*"):
        if not path.name.endswith((".part", ".lock", ".flock")):
            try:
                times.append(path.stat().st_mtime)
            except FileNotFoundError:
                continue
    return max(times)


def test_a_search_killed_while_it_runs_ends_as_an_undisturbed_one(
    undisturbed: Undisturbed, tiny_checkpoint: Path, short: Texts, tmp_path: Path
) -> None:
    expected, seconds = undisturbed(0, "none")
    options = arguments(tiny_checkpoint, short, tmp_path / "out", 0)
    assert disturbed(options, tmp_path, kill_driver, [0.5 * seconds, 0.6 * seconds], random.Random(1))
    same(tmp_path / "out", expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "kill", "workers", "repair", "times"),
    [
        ("the driver, without Ray", kill_driver, 0, "auto", 10),
        ("the driver of two Ray workers", kill_driver, 2, "none", 6),
        ("a Ray worker", kill_worker, 2, "none", 8),
        ("Ray's raylet", kill_raylet, 2, "none", 6),
    ],
)
def test_kills_at_random_moments_change_nothing(
    name: str,
    kill: Kill,
    workers: int,
    repair: str,
    times: int,
    undisturbed: Undisturbed,
    tiny_checkpoint: Path,
    short: Texts,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """30 in all, over as many studies as they take."""
    rng = random.Random(name)
    expected, whole = undisturbed(workers, repair)
    seconds: list[float] = []
    study = 0
    while len(seconds) < times:
        study += 1
        folder = tmp_path / str(study)
        folder.mkdir()
        options = arguments(tiny_checkpoint, short, folder / "out", workers, repair)
        blows = min(6, times - len(seconds))
        moments = [rng.uniform(1.0, 0.8 * whole) for _ in range(blows)]
        seconds += disturbed(options, folder, kill, moments, rng)
        same(folder / "out", expected)
    _, left = psutil.wait_procs(Command.agents, timeout=150)
    assert not left
    record_property(
        "fault",
        json.dumps(
            {
                "fault": f"kill -9 of {name} at a random moment",
                "injected": len(seconds),
                "lost": 0,
                "seconds": round(statistics.median(seconds), 1),
            }
        ),
    )
