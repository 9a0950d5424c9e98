"""Thousands of trials: nothing is lost, memory and the time between two evaluations stay small."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.pool import Job
from search.ray_pool import RayPool
from search.study import finished
from search.worker import Setup
from tests.soak.load import Load, Times, stored
from tests.soak.workers import SyntheticWorker

TRIALS = 5000
WINDOW = 250
SETTLED = 1000
"""Trials after which the driver has all of its libraries in memory."""

MOST_BYTES = 40_000
"""Per trial, 30,000 measured. Optuna keeps all of a study in memory: 59 parameters of a trial, three measures
of 64 windows, the place of each of its 75 lines in the journal; and so do the sampler (what options it adds
up) and the tracker (where its run is)."""

MOST_SECONDS = 0.1


class HerePool:
    """A synthetic worker in this process."""

    size = 1

    def __init__(self) -> None:
        self.worker = SyntheticWorker()

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        return [getattr(self.worker, method)(*args) for method, args in jobs]


def test_a_trial_after_many_takes_as_long_as_an_early_one(tmp_path: Path) -> None:
    early, many, late = 32, 2000, 24
    load = Load(tmp_path, HerePool(), real=False)  # type: ignore[arg-type]
    load.run(early)
    # The first trials are baselines, which nobody has to propose.
    first, load.times = 1000 * float(np.median(load.times.whole[-16:])), Times()
    load.fill(many)
    load.run(early + many + late)
    last = 1000 * float(np.median(load.times.whole[-16:]))
    assert last < 3 * first, f"{first:.0f} ms per trial, then {last:.0f} ms"
    assert len(finished(load.study)) == early + many + late


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_5000_trials_on_two_ray_workers(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pool, begun = RayPool(Setup("none", "none", str(tmp_path)), 2, kind=SyntheticWorker), time.monotonic()
    load = Load(tmp_path, pool, WINDOW)
    try:
        load.run(TRIALS)
    finally:
        pool.close()
    seconds, times = time.monotonic() - begun, load.times
    trials = stored(tmp_path)
    logged = load.logged()

    def milliseconds(values: list[float]) -> list[float]:
        return [
            round(1000 * float(np.median(values[i : i + WINDOW])), 1) for i in range(0, len(values), WINDOW)
        ]

    found = {
        "trials": len(trials), "lost": TRIALS - len(set(logged) & {t.number for t in trials}),
        "seconds": round(seconds, 1), "bytes_per_trial": round(times.slope(SETTLED)),
        "held_up_ms_of_the_last_250": round(1000 * times.held_up(WINDOW), 1),
        "ask_ms": milliseconds(times.ask), "tell_ms": milliseconds(times.tell),
        "log_ms": milliseconds(times.log), "whole_ms": milliseconds(times.whole),
        "mlflow_writer_ms": milliseconds(times.write),
        "memory_mb": [round(size / 1e6, 1) for _, size in times.memory],
        "journal_bytes_per_trial": (tmp_path / "study.journal").stat().st_size // TRIALS,
    }  # fmt: skip
    record_property("soak", json.dumps(found))
    print(json.dumps(found))
    assert [t.number for t in trials] == logged == list(range(TRIALS))
    assert times.slope(SETTLED) < MOST_BYTES, found
    assert times.held_up(WINDOW) < MOST_SECONDS, found
