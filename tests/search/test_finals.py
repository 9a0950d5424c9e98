"""Finalists are distinct and best, winners are chosen on unseen text, and comparisons are paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search.finals import FINALISTS, baseline_trials, compare, finalists, score_on, winners
from search.runner import TrialRunner
from search.sampler import make_sampler
from search.study import finished, open_study
from spaces.space import PORTABLE, RAGGED
from tests.search import synthetic
from tests.search.fake_pool import FakePool, make_runner
from tests.spaces import tiny

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

ALLOCATOR = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.5)
SPACE = ALLOCATOR.space


@pytest.fixture(scope="module")
def pool() -> FakePool:
    return FakePool(lambda c: 0.001 * (int(c.key, 16) % 997 + 1))


@pytest.fixture(scope="module")
def runner(pool: FakePool) -> TrialRunner:
    study = open_study("s", optuna.storages.InMemoryStorage(), {})
    study.sampler = make_sampler("random", ALLOCATOR, 0)
    types = {t.name: "Q4_K" if t.row % 256 == 0 else "Q8_0" for t in SPACE.inventory.quantizable}
    for _ in range(2):  # the same candidate twice
        study.enqueue_trial(SPACE.params(types, 4, "reap"), user_attrs={"baseline": "uniform"})
    runner = make_runner(study, ALLOCATOR, pool)
    runner.run(24)
    return runner


def test_finalists_are_the_best_complete_candidates_of_each_form(runner: TrialRunner) -> None:
    chosen = finalists(runner)
    complete = [t for t in finished(runner.study) if t.state == TrialState.COMPLETE]
    assert set(chosen) == {PORTABLE, RAGGED}
    for form, trials in chosen.items():
        of_form = [t for t in complete if SPACE.candidate(t.params).portable == (form == PORTABLE)]
        distinct = {t.user_attrs["candidate"]: t.user_attrs["scores"]["kl"] for t in of_form}
        assert [t.user_attrs["scores"]["kl"] for t in trials] == sorted(distinct.values())[:FINALISTS]
        assert len({t.user_attrs["candidate"] for t in trials}) == len(trials)


def test_baselines_are_found_by_name(runner: TrialRunner) -> None:
    assert set(baseline_trials(runner)) == {"uniform"}


def test_scores_on_another_text_are_kept_for_a_run_that_goes_on(runner: TrialRunner, tmp_path: Path) -> None:
    trials = finished(runner.study)[:3]
    pool = FakePool(lambda c: 0.5)
    progress: list[tuple[int, int]] = []
    first = score_on(pool, runner, trials, "selection", 2048, 4.0, tmp_path, lambda *at: progress.append(at))
    assert {(name, last) for _, name, last in pool.scored} == {("selection", 2048)}
    assert first.keys() == {t.number for t in trials}
    assert all(s["kl"] == pytest.approx(0.5) and len(s["windows_kl"]) == 8 for s in first.values())
    assert progress[-1] == (3, 3)

    silent = FakePool(lambda c: 9.0)
    assert score_on(silent, runner, trials, "selection", 2048, 4.0, tmp_path) == first
    assert not silent.scored
    score_on(silent, runner, trials, "report", 2048, 4.0, tmp_path)
    assert {name for _, name, _ in silent.scored} == {"report"}


def test_winners_have_the_lowest_kl_on_the_selection_text(runner: TrialRunner) -> None:
    chosen = finalists(runner)
    # The last finalist of each form turns out best.
    selection: dict[int, dict[str, Any]] = {
        t.number: {"kl": 1.0 - 0.1 * i} for trials in chosen.values() for i, t in enumerate(trials)
    }
    assert winners(chosen, selection) == {form: trials[-1].number for form, trials in chosen.items()}
    assert winners({PORTABLE: [], RAGGED: []}, {}) == {PORTABLE: None, RAGGED: None}


def test_comparison_is_paired_by_window() -> None:
    winner = {"kl": 0.2, "windows_kl": [0.1, 0.2, 0.3]}
    other = {"kl": 0.4, "windows_kl": [0.3, 0.4, 0.5]}
    compared = compare(winner, other)
    assert compared["kl_difference"] == pytest.approx(0.2)
    assert compared["kl_difference_95"] == pytest.approx(0.0, abs=1e-12)  # the same in every window
    assert compared["kl_ratio"] == pytest.approx(0.5)
    uneven = compare(winner, {"kl": 0.4, "windows_kl": [0.1, 0.4, 0.7]})
    assert uneven["kl_difference"] == pytest.approx(0.2)
    assert uneven["kl_difference_95"] == pytest.approx(1.96 * 0.2 / 3**0.5)


def test_a_comparison_with_itself_is_even() -> None:
    same = {"kl": 0.0, "windows_kl": [0.0]}
    assert compare(same, same) == {"kl_difference": 0.0, "kl_difference_95": 0.0, "kl_ratio": 1.0}
