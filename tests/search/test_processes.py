"""A process is known by its number and its start, whatever becomes of the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import optuna
import psutil
import pytest

from search.drivers import Crew
from search.processes import started
from tests.search.mortal import dead_process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is set anew whenever somebody looks."""
    steps = count(1.7e9, 2.0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: next(steps))


@pytest.mark.usefixtures("stepped")
def test_the_start_does_not_move_with_the_wall_clock() -> None:
    own = started(os.getpid())
    assert own is not None
    assert started(os.getpid()) == own


@pytest.mark.usefixtures("stepped")
def test_a_living_driver_lives_when_the_wall_clock_is_set() -> None:
    study = optuna.create_study()
    first, second = Crew(study), Crew(study)
    assert [*second.others()] == [first.name]
    first.close()
    second.close()


def test_a_process_that_has_ended_was_started_never() -> None:
    assert started(dead_process()) is None


def test_a_process_that_waits_to_be_collected_has_ended() -> None:
    with child("") as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}/stat").exists()
        assert started(process.pid) is None


def test_the_name_of_a_process_may_hold_anything() -> None:
    code = "open('/proc/self/comm', 'w').write('a) Z 1 (b'); print(flush=True); input()"
    with child(code) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        mine, its = started(os.getpid()), started(process.pid)
        process.stdin.write(b"\n")
    assert mine is not None
    assert its is not None
    assert its > mine
