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

from search.drivers import OWNER, Crew, unless_taken
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


@pytest.mark.parametrize("fraction", [0.41, 0.58])
def test_a_study_goes_on_as_an_undisturbed_one_when_its_machine_was_started_anew(
    fraction: float,
    undisturbed: tuple[list, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, writes = undisturbed
    assert not Driver(tmp_path, int(fraction * writes)).drive(TOTAL)
    monkeypatch.setattr("search.drivers.place", lambda: "the machine after a reboot")
    monkeypatch.setattr("search.runner._PATIENCE", 0.02)
    assert Driver(tmp_path, lease=0.2).drive(TOTAL)
    assert outcome(tmp_path) == expected
    assert capsys.readouterr().out.count("waiting for a sign of it") == 1


def test_a_study_killed_in_its_last_round_is_extended_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.runner._PATIENCE", 0.02)
    first, later = 10, 14
    whole, killed = Driver(tmp_path / "whole", 10**9), tmp_path / "killed"
    assert whole.drive(first)
    assert whole.journal.left is not None
    writes = 10**9 - whole.journal.left
    assert Driver(whole.folder).drive(later)
    assert not Driver(killed, writes - 6).drive(first)  # one of two is told
    assert Driver(killed).drive(first)
    assert Driver(killed).drive(later)
    assert outcome(killed) == outcome(whole.folder)


@pytest.mark.parametrize("sampler", ["random", "nsgaii", "tpe"])
def test_other_samplers_end_as_undisturbed_too(sampler: str, tmp_path: Path) -> None:
    driver = Driver(tmp_path / "undisturbed", 10**9, sampler=sampler)
    assert driver.drive(TOTAL)
    assert driver.journal.left is not None
    expected = outcome(tmp_path / "undisturbed")
    for i, moment in enumerate(moments(10**9 - driver.journal.left, 3)):
        folder = tmp_path / str(i)
        Driver(folder, moment, cut=9 * (i % 2), sampler=sampler).drive(TOTAL)
        assert Driver(folder, sampler=sampler).drive(TOTAL)
        assert outcome(folder) == expected, moment


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


def sign(study: optuna.Study, beat: int) -> None:
    """Signs for a driver of another machine."""
    note = {"place": "another machine", "pid": dead_process(), "started": 0.0, "tracking": "", "beat": beat}
    study.set_user_attr("driver:far", note)


def test_a_far_drivers_death_is_a_beat_that_stands_still(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    watching = Crew(other, beat=1000, lease=0.3)
    sign(one, 1)
    assert list(watching.others()) == ["far"]
    sign(one, 2)
    assert list(watching.others()) == ["far"]
    waited = threading.Event()
    waited.wait(0.4)
    assert list(watching.others()) == []
    watching.close()


def test_whether_a_far_driver_lives_is_unknown_until_it_beats_or_its_lease_is_over(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    sign(one, 1)
    first, second = (Crew(other, beat=1000, lease=0.3) for _ in range(2))
    assert not first.unsure()  # it runs nothing
    one.ask(DISTRIBUTIONS).set_user_attr(OWNER, "far")
    assert first.unsure()
    sign(one, 2)
    assert not first.unsure()
    assert first.busy() == 1
    assert second.unsure()  # has seen no beat but this one
    threading.Event().wait(0.4)
    assert not second.unsure()
    first.close()
    second.close()


def test_whether_a_near_driver_lives_is_known_at_once(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    first, second = Crew(one), Crew(other)
    first.own(one.ask(DISTRIBUTIONS))
    assert not second.unsure()
    first.close()
    second.close()


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_a_trial_that_another_driver_ended_meanwhile_stays_as_it_is(
    state: TrialState, tmp_path: Path
) -> None:
    one, other = two(tmp_path)
    trial = one.ask(DISTRIBUTIONS)
    other.tell(trial.number, [1.0] * 3 if state == TrialState.COMPLETE else None, state=state)
    with unless_taken(trial):
        trial.set_user_attr("scores", {})
    with unless_taken(trial):
        one.tell(trial, [2.0] * 3)
    (found,) = one.get_trials()
    assert (found.state, found.user_attrs) == (state, {})
    assert found.values == ([1.0] * 3 if state == TrialState.COMPLETE else None)


def test_an_error_about_a_running_trial_is_not_hidden(tmp_path: Path) -> None:
    one, _ = two(tmp_path)
    trial = one.ask(DISTRIBUTIONS)
    with pytest.raises(ValueError, match="a mistake"), unless_taken(trial):
        raise ValueError("a mistake")


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
