"""A driver on any storage, with a pool that scores by a formula and takes its time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from search.drivers import OWNER, Crew
from search.journal import JournalFile
from search.pool import Job
from search.sampler import make_sampler
from search.study import finished, open_storage, open_study
from tests.search.fake_pool import FakePool, make_runner
from tests.search.rounds import ALLOCATOR, params, scrambled

BASELINES = ("uniform", "paper-rules")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # what takes seconds to import is imported once
DEADLINE = 120.0
"""Seconds that a driver may take."""


LEASE = 10.0
"""Seconds after which a trial that was made and never noted as anyone's is tried again."""


class SlowPool(FakePool):
    """Takes some seconds for every score."""

    def __init__(self, seconds: float) -> None:
        super().__init__(scrambled)
        self.seconds = seconds

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        time.sleep(self.seconds)
        return super().run(jobs, on_result)


def storage(name: str) -> BaseStorage:
    """A storage by a URL, or a journal under one of its locks: `flock:FILE` or `lockfile:FILE`."""
    kind, _, file = name.partition(":")
    if kind in ("flock", "lockfile"):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return JournalStorage(JournalFile(Path(file), network=kind == "lockfile"))
    return open_storage(name, Path("unused"))


def drive(name: str, total: int, seconds: float, barrier: Any) -> None:
    """Fills the study up to so many trials, the baselines first; begins when all drivers are there."""
    study = open_study("s", storage(name), {})
    study.sampler = make_sampler("knapsack", ALLOCATOR, 0)
    crew = Crew(study, lease=LEASE)
    runner = make_runner(study, ALLOCATOR, SlowPool(seconds))
    runner.crew = crew
    barrier.wait(DEADLINE)
    for criterion, baseline in zip(("reap", "paper"), BASELINES, strict=True):  # all find them missing
        study.enqueue_trial(params(criterion=criterion), user_attrs={"baseline": baseline})
    try:
        runner.run(total)
    finally:
        crew.close()


def first_look(name: str, barrier: Any) -> None:
    """Opens a storage, which may be new, at the same moment as others."""
    barrier.wait(DEADLINE)
    open_study("s", storage(name), {"seed": 0})


def take(name: str, count: int, barrier: Any, taken: Any) -> None:
    """Asks for so many trials at the same moment as others, and puts their numbers into a queue."""
    study = open_study("s", storage(name), {})
    barrier.wait(DEADLINE)
    taken.put([study.ask().number for _ in range(count)])


class Drivers:
    """Drivers of one study, each a process of its own.

    Args:
        name: Of the storage.
        total: Trials wanted.
        count: Drivers.
        seconds: That a score takes.
    """

    def __init__(self, name: str, total: int, count: int = 2, seconds: float = 0.05) -> None:
        self.study = open_study("s", storage(name), {})
        self._barrier = PROCESSES.Barrier(count)  # gone as soon as nobody here holds it
        own = (name, total, seconds, self._barrier)
        self.processes = [PROCESSES.Process(target=drive, args=own, daemon=True) for _ in range(count)]
        for process in self.processes:
            process.start()

    def wait(self) -> None:
        """Until all have ended; none may have failed."""
        deadline = time.monotonic() + DEADLINE
        for process in self.processes:
            process.join(max(1.0, deadline - time.monotonic()))
        assert [p.exitcode for p in self.processes] == [0] * len(self.processes)

    def end(self) -> None:
        """Kills those that are left."""
        for process in self.processes:
            process.kill()
            process.join()

    def running(self, owner: str | None = None) -> list[FrozenTrial]:
        """Trials that run; those of a driver, where one is named."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in trials if owner is None or t.user_attrs.get(OWNER) == owner]

    def kill_one(self, after: int) -> tuple[list[FrozenTrial], float]:
        """kill -9 of a driver in the midst of trials.

        Args:
            after: Finished trials to wait for before.

        Returns:
            The trials it ran, and seconds until none of them was its own any more.
        """
        victim = self.processes[0]
        deadline = time.monotonic() + DEADLINE
        owner, lost = None, []
        while time.monotonic() < deadline:
            owner = owner or self._named(victim.pid)
            if owner and len(finished(self.study)) >= after and self.running(owner):
                os.kill(victim.pid, signal.SIGSTOP)  # so that what was seen still holds
                lost = self.running(owner)
                if lost:
                    break
                os.kill(victim.pid, signal.SIGCONT)
            time.sleep(0.01)
        victim.kill()
        victim.join()
        self.processes.remove(victim)
        begun = time.monotonic()
        while self.running(owner) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.running(owner)
        return lost, time.monotonic() - begun

    def _named(self, pid: int | None) -> str | None:
        notes = {k: v for k, v in self.study.user_attrs.items() if k.startswith("driver:") and v}
        return next((k.removeprefix("driver:") for k, v in notes.items() if v["pid"] == pid), None)
