"""A study whose driver is killed at any write ends as an undisturbed one; two drivers share it fairly."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from search.drivers import Crew
from search.journal import JournalFile
from search.study import finished, open_study
from tests.search.mortal import Driver, dead_process, outcome
from tests.search.rounds import ALLOCATOR, params

TOTAL = 20
DISTRIBUTIONS = ALLOCATOR.space.distributions


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, int]:
    """The outcome, and the writes it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    driver = Driver(folder, 10**9)
    assert driver.drive(TOTAL)
    assert driver.journal.left is not None
    return outcome(folder), 10**9 - driver.journal.left


def killed_at(folder: Path, moments: list[int]) -> list:
    """The outcome of a study whose drivers die after so many writes, each but the last."""
    rng = random.Random(0)
    for writes in moments:
        Driver(folder, writes, cut=rng.choice([0, 1, 9])).drive(TOTAL)
    assert Driver(folder).drive(TOTAL)
    return outcome(folder)


def moments(writes: int, count: int) -> list[int]:
    rng = random.Random(count)
    return [rng.randrange(writes) for _ in range(count)]


@pytest.mark.parametrize("fraction", [0.0, 0.07, 0.21, 0.39, 0.41, 0.58, 0.79, 0.93, 0.995, 0.999])
def test_a_study_killed_at_a_write_ends_as_an_undisturbed_one(
    fraction: float, undisturbed: tuple[list, int], tmp_path: Path
) -> None:
    expected, writes = undisturbed
    assert killed_at(tmp_path, [int(fraction * writes)]) == expected


def test_a_study_killed_again_and_again_ends_as_an_undisturbed_one(
    undisturbed: tuple[list, int], tmp_path: Path
) -> None:
    expected, writes = undisturbed
    assert killed_at(tmp_path, moments(writes // 3, 6)) == expected


@pytest.mark.slow
def test_a_study_killed_at_200_writes_ends_as_an_undisturbed_one(
    undisturbed: tuple[list, int], tmp_path: Path
) -> None:
    expected, writes = undisturbed
    for i, moment in enumerate(moments(writes, 200)):
        assert killed_at(tmp_path / str(i), [moment]) == expected, moment


@pytest.mark.parametrize("sampler", ["random", "nsgaii"])
def test_other_samplers_trials_still_fit_after_a_kill(sampler: str, tmp_path: Path) -> None:
    for i, writes in enumerate((150, 163)):
        folder = tmp_path / str(i)
        Driver(folder, writes, sampler=sampler).drive(6)
        assert Driver(folder, sampler=sampler).drive(6)
        study = optuna.load_study(
            study_name="s", storage=JournalStorage(JournalFile(folder / "study.journal"))
        )
        done = finished(study)
        assert len(done) == 6
        assert all(t.user_attrs["scores"]["target_bytes"] <= ALLOCATOR.limit for t in done)
        assert not study.get_trials(states=(TrialState.RUNNING,))


def two(folder: Path) -> tuple[optuna.Study, optuna.Study]:
    return tuple(open_study("s", JournalStorage(JournalFile(folder / "study.journal")), {}) for _ in range(2))  # type: ignore[return-value]


def test_a_living_drivers_trials_are_left_alone(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    first, second = Crew(one), Crew(other)
    trial = one.ask(DISTRIBUTIONS)
    assert second.adopt(DISTRIBUTIONS) == []  # made, not yet noted: somebody lives who may have made it
    first.own(trial)
    assert second.adopt(DISTRIBUTIONS) == []
    assert second.busy() == 1
    assert first.busy() == 0
    first.close()
    assert [t.number for t in second.adopt(DISTRIBUTIONS)] == [trial.number]
    second.close()


def test_among_the_living_one_tries_a_dead_drivers_trial_again(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    dead = Crew(one)
    one.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    left = one.ask(DISTRIBUTIONS)
    dead.own(left)
    dead.close()
    first, second = Crew(one), Crew(other)
    first.adopt(DISTRIBUTIONS)
    second.adopt(DISTRIBUTIONS)
    states = Counter(t.state for t in one.get_trials())
    assert states == {TrialState.FAIL: 1, TrialState.WAITING: 1}
    again = other.ask(DISTRIBUTIONS)
    assert again.params == params()
    assert again.user_attrs == {"retry_of": left.number, "baseline": "uniform"}
    first.close()
    second.close()


def test_a_far_drivers_death_is_a_beat_that_stands_still(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    watching = Crew(other, beat=1000, lease=0.3)
    note = {"place": "another machine", "pid": dead_process(), "started": 0.0, "tracking": "", "beat": 1}
    one.set_user_attr("driver:far", note)
    assert list(watching.others()) == ["far"]
    one.set_user_attr("driver:far", {**note, "beat": 2})
    assert list(watching.others()) == ["far"]
    waited = threading.Event()
    waited.wait(0.4)
    assert list(watching.others()) == []
    watching.close()


def test_a_result_for_a_trial_that_was_given_to_another_driver_is_dropped(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    runner = driver.runner()
    measure = driver.pool.run

    def taken_meanwhile(jobs, on_result=lambda i, result: None):  # type: ignore[no-untyped-def]
        running = runner.study.get_trials(states=(TrialState.RUNNING,))
        for trial in running:
            runner.study.tell(trial.number, state=TrialState.FAIL)
        if running:
            driver.pool.run = measure  # type: ignore[method-assign]
        return measure(jobs, on_result)

    driver.pool.run = taken_meanwhile  # type: ignore[method-assign]
    runner.run(3)
    states = Counter(t.state for t in runner.study.get_trials())
    assert states[TrialState.FAIL] == 3
    assert len(finished(runner.study)) == 3


def test_two_drivers_at_once_make_exactly_the_trials_that_were_wanted(tmp_path: Path) -> None:
    drivers = [Driver(tmp_path), Driver(tmp_path)]
    runners = [d.runner() for d in drivers]
    for runner in runners:  # both have seen that the baseline is missing
        runner.study.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    threads = [threading.Thread(target=r.run, args=(30,)) for r in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = finished(runners[0].study)
    assert len(done) == 30
    assert [t.user_attrs.get("baseline") for t in done].count("uniform") == 1
    assert len({t.user_attrs["driver"] for t in done}) == 2
    assert not runners[0].study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
