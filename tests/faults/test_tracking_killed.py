"""kill -9 while MLflow's database is made: the next start makes it whole."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from search.tracking import check_tracking
from tests.faults.commands import ROOT
from tests.quick_disk import quick_folder

CODE = "import sys; from search.tracking import check_tracking; check_tracking(sys.argv[1])"
MAKING = 2.0  # seconds that MLflow's migrations take, about


def killed(database: Path, seconds: float) -> None:
    """Kills a process so many seconds after it began to make a database."""
    process = subprocess.Popen([sys.executable, "-c", CODE, f"sqlite:///{database}"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not list(database.parent.glob(f"*{database.name}*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seconds)
    finally:
        process.kill()
        process.wait()


def test_a_start_after_a_kill_makes_the_database(tmp_path: Path) -> None:
    with quick_folder(tmp_path) as folder:
        database = folder / "mlflow.db"
        killed(database, 0.5)
        assert not database.exists()
        check_tracking(f"sqlite:///{database}")
        assert database.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_of_the_making(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    rng, seconds = random.Random(0), []
    with quick_folder(tmp_path) as folder:
        for number in range(20):
            database = folder / f"{number}.db"
            killed(database, rng.uniform(0, MAKING))
            begun = time.monotonic()
            check_tracking(f"sqlite:///{database}")
            seconds.append(round(time.monotonic() - begun, 2))
            database.unlink()
    middle = round(statistics.median(seconds), 1)
    told = {"fault": "kill -9 while MLflow's database is made", "injected": 20, "lost": 0, "seconds": middle}
    record_property("fault", json.dumps(told))
