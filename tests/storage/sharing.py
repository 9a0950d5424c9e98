"""What must hold of a study that several drivers filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from search.drivers import OWNER
from search.study import finished, open_study
from tests.storage.drive import BASELINES, DEADLINE, PROCESSES, Drivers, first_look, storage, take


def check(name: str, total: int, drivers: int) -> list[FrozenTrial]:
    """Exactly the trials wanted, each with scores, baselines once, all drivers took part; returns them."""
    study = open_study("s", storage(name), {})
    done = finished(study)
    assert len(done) == total
    named = [t.user_attrs["baseline"] for t in done if "baseline" in t.user_attrs]
    assert sorted(named) == sorted(BASELINES)
    assert len({t.user_attrs[OWNER] for t in done}) == drivers
    assert not study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    again = [t.user_attrs["retry_of"] for t in done if "retry_of" in t.user_attrs]
    assert len(again) == len(set(again)), "a trial was tried again twice"
    return done


def check_survived(name: str, lost: Sequence[FrozenTrial], done: Sequence[FrozenTrial]) -> None:
    """Every trial that a killed driver ran was finished by another one, or ended."""
    kept = {t.number for t in done}
    study = open_study("s", storage(name), {})
    states = {t.number: t.state for t in study.get_trials(deepcopy=False)}
    assert lost
    for trial in lost:
        assert trial.number in kept or states[trial.number] == TrialState.FAIL


def shared(name: str, total: int) -> None:
    """Two drivers fill a study."""
    drivers = Drivers(name, total)
    try:
        drivers.wait()
    finally:
        drivers.end()
    check(name, total, 2)


def survived(name: str, total: int, count: int) -> tuple[int, float]:
    """Drivers fill a study, one of which is killed; its running trials, and seconds until others had them."""
    drivers = Drivers(name, total, count, seconds=0.3)
    try:
        lost, seconds = drivers.kill_one(after=total // 3)
        drivers.wait()
    finally:
        drivers.end()
    done = check(name, total, count)
    check_survived(name, lost, done)
    return len(lost), seconds


def opened_at_once(name: str, count: int) -> None:
    """Processes open a storage that holds nothing yet, all at once; none may fail."""
    _at_once(first_look, count, name)
    assert open_study("s", storage(name), {"seed": 0}).user_attrs["identity"] == {"seed": 0}


def taken_at_once(name: str, count: int, each: int = 25) -> None:
    """Processes ask for enqueued trials, all at once; none may be given to two."""
    study = open_study("s", storage(name), {})
    for _ in range(count * each):
        study.enqueue_trial({})
    queue = PROCESSES.Queue()
    _at_once(take, count, name, each, after=(queue,))
    numbers = [number for _ in range(count) for number in queue.get(timeout=DEADLINE)]
    assert sorted(numbers) == list(range(count * each))


def _at_once(work: Callable[..., None], count: int, *args: Any, after: tuple[Any, ...] = ()) -> None:
    """Runs work(*args, barrier, *after) in so many processes."""
    barrier = PROCESSES.Barrier(count)
    own = (*args, barrier, *after)
    processes = [PROCESSES.Process(target=work, args=own, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
    codes = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * count
