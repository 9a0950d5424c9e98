"""Trials climb rungs of nested texts, losers stop, and of each it is known what it took."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial

from search.runner import ROUND, RUNGS
from search.sampler import KnapsackSampler
from search.stages import SEARCH_TOKENS
from search.study import finished
from spaces.candidate import Candidate
from spaces.errors import UserError
from tests.search import synthetic
from tests.search.fake_pool import TEXT, FakePool, make_runner
from tests.search.rounds import (
    ALLOCATOR,
    COMPLETE,
    PRUNED,
    SPACE,
    by_key,
    key,
    one_by_one,
    params,
    scrambled,
    states,
    steps,
    study_of,
    together,
)
from tests.spaces import tiny

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

FIRST, SECOND, LAST = (TEXT.spread(tokens).windows for tokens in RUNGS)


def test_trials_are_run_until_there_are_as_many_as_asked_for() -> None:
    study, pool = study_of(), FakePool(lambda c: 1.0)
    runner = make_runner(study, ALLOCATOR, pool)
    runner.run(6)
    assert len(finished(study)) == 6
    runner.run(6)
    assert len(study.get_trials()) == 6
    runner.run(ROUND + 7)
    assert len(finished(study)) == ROUND + 7


def test_a_finished_trial_holds_scores_and_what_it_was() -> None:
    study = study_of()
    told: list[FrozenTrial] = []
    runner = make_runner(study, ALLOCATOR, FakePool(lambda c: 0.25))
    runner.on_trial = told.append
    study.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    runner.run(1)
    (trial,) = finished(study)
    scores, candidate = trial.user_attrs["scores"], SPACE.candidate(params())
    assert trial.state == COMPLETE
    assert told == [trial]
    assert trial.params == params()
    assert trial.user_attrs["candidate"] == candidate.key
    predicted = pytest.approx(ALLOCATOR.model.predict(params()))
    assert trial.user_attrs["predicted_kl"] == trial.user_attrs["additive_kl"] == predicted
    assert scores["kl"] == pytest.approx(0.25)
    assert scores["tokens"] == SEARCH_TOKENS
    assert scores["target_bytes"] == scores["model_bytes"] == SPACE.inventory.file_bytes(candidate.plan)
    assert scores["device_memory_bytes"] == scores["target_bytes"] + 6000
    assert trial.values == [scores["kl"], scores["target_bytes"], scores["tokens_per_second"]]
    assert trial.constraints == {"bytes over budget": scores["target_bytes"] / ALLOCATOR.limit - 1}


def test_the_budget_sampler_predicts_what_it_believes_and_not_the_sum_of_costs() -> None:
    study = study_of(sampler="knapsack")
    runner = make_runner(study, ALLOCATOR, FakePool(scrambled))
    runner.run(ROUND)
    before = [t for t in study.get_trials() if t.state.is_finished()]
    study.enqueue_trial(params())
    runner.run(ROUND + 1)
    trial, sampler = finished(study)[-1], study.sampler
    assert isinstance(sampler, KnapsackSampler)
    assert trial.user_attrs["predicted_kl"] == pytest.approx(sampler.predict(before, params()))
    assert trial.user_attrs["additive_kl"] == pytest.approx(ALLOCATOR.model.predict(params()))
    assert trial.user_attrs["predicted_kl"] != pytest.approx(trial.user_attrs["additive_kl"], rel=0.02)


def test_a_trial_climbs_rungs_of_text_that_hold_the_ones_before() -> None:
    assert list(RUNGS) == sorted(RUNGS)
    assert RUNGS[-1] == SEARCH_TOKENS
    assert FIRST.size < SECOND.size < LAST.size
    for smaller, larger in ((FIRST, SECOND), (SECOND, LAST)):
        assert smaller.shape <= larger.shape
    pool = FakePool(lambda c: 1.0, spread=lambda c, w, length: w + length)  # says what was seen
    runner = make_runner(study_of(), ALLOCATOR, pool)
    one_by_one(runner, params())
    assert steps(pool, params()) == list(RUNGS)
    (trial,) = finished(runner.study)
    seen = {
        str(tokens): [float(w + windows.shape[1]) for w in range(len(windows))]
        for tokens, windows in zip(RUNGS, (FIRST, SECOND, LAST), strict=True)
    }
    assert trial.user_attrs["rungs"] == seen
    assert trial.user_attrs["windows"]["kl"] == seen[str(RUNGS[-1])]


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize("kl", [0.2, 0.100001])
def test_a_trial_that_is_worse_at_all_is_stopped_on_the_first_rung(
    kl: float, run: Callable[..., None]
) -> None:
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    pool = by_key({key(good): 0.1, key(bad): kl})
    runner = make_runner(study_of(), ALLOCATOR, pool)
    run(runner, good, bad)
    stopped = runner.study.get_trials()[1]
    assert stopped.state == PRUNED
    assert stopped.user_attrs["scores"]["kl"] == pytest.approx(kl)
    assert stopped.user_attrs["scores"]["tokens"] == FIRST.size
    assert stopped.user_attrs["rungs"].keys() == {str(RUNGS[0])}
    assert (steps(pool, good), steps(pool, bad)) == (list(RUNGS), [RUNGS[0]])


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize(
    ("other", "kl"),
    [
        (params(criterion="paper", kept=4), 0.0625),  # better
        (params(criterion="paper", kept=4), 0.125),  # as good
        (params("IQ3_XXS", kept=4), 5.0),  # much worse, but smaller and faster
        (params(kept=4) | {"top_k": 1}, 5.0),  # as large, but faster
    ],
    ids=["better", "as-good", "smaller", "faster"],
)
def test_a_trial_that_no_other_beats_in_everything_goes_on(
    other: dict[str, Any], kl: float, run: Callable[..., None]
) -> None:
    good = params(kept=4)
    pool = by_key({key(good): 0.125, key(other): kl}, spread=lambda c, w, length: 1.0)
    runner = make_runner(study_of(), ALLOCATOR, pool)
    run(runner, good, other)
    assert states(runner)[1] == COMPLETE
    assert states(runner)[0] == (PRUNED if kl < 0.125 and run is together else COMPLETE)


def test_what_decides_on_later_rungs_is_the_difference_on_the_same_text() -> None:
    """Windows are hard or easy for all alike; where candidates differ by chance, nothing is clear early."""
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    hard = [math.exp(1.5 * x) for x in np.random.default_rng(0).standard_normal(len(LAST))]

    def worse(candidate: Candidate, by: float, length: int) -> float:
        return 1 + by * (candidate.key == key(bad) and length > FIRST.shape[1])

    def chance(candidate: Candidate, window: int, length: int) -> float:
        flip = length > FIRST.shape[1] and window % 2 == (candidate.key == key(good))
        return worse(candidate, 0.02, length) + 0.5 * flip

    for spread, state in (
        (lambda c, w, n: hard[w] * worse(c, 0.02, n), PRUNED),
        (lambda c, w, n: hard[w] * worse(c, 0.004, n), COMPLETE),  # less than matters
        (chance, COMPLETE),
    ):
        pool = by_key({}, spread=spread)
        runner = make_runner(study_of(), ALLOCATOR, pool)
        one_by_one(runner, good, bad)
        assert states(runner) == [COMPLETE, state]
        assert steps(pool, bad) == list(RUNGS)[: 2 if state == PRUNED else 3]


def test_trials_of_a_round_stop_each_other() -> None:
    worst, good, middle = (params(criterion=c, kept=4) for c in ("reap", "mass", "paper"))
    pool = by_key({key(worst): 0.3, key(good): 0.1, key(middle): 0.2})
    runner = make_runner(study_of(), ALLOCATOR, pool)
    together(runner, worst, good, middle)
    assert states(runner) == [PRUNED, COMPLETE, PRUNED]
    assert [steps(pool, p) for p in (worst, good, middle)] == [[RUNGS[0]], list(RUNGS), [RUNGS[0]]]


def test_a_trial_beaten_on_the_last_rung_is_complete() -> None:
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)

    def late(candidate: Candidate, window: int, length: int) -> float:
        return 3.0 if candidate.key == key(bad) and window >= len(SECOND) else 1.0

    runner = make_runner(study_of(), ALLOCATOR, by_key({}, spread=late))
    one_by_one(runner, good, bad)
    assert states(runner) == [COMPLETE, COMPLETE]


def test_a_baseline_is_never_stopped() -> None:
    good, simple = params(kept=4), params(criterion="paper", kept=4)
    runner = make_runner(study_of(), ALLOCATOR, by_key({key(good): 0.1, key(simple): 9.0}))
    for name in ("in a round with a better one", "after a better one"):
        runner.study.enqueue_trial(simple, user_attrs={"baseline": name})
        if name.startswith("in"):
            runner.study.enqueue_trial(good)
        runner.run(2 if name.startswith("in") else 3)
    assert states(runner) == [COMPLETE] * 3


@pytest.mark.parametrize("run", [one_by_one, together])
def test_a_trial_is_not_stopped_by_one_of_the_other_form(run: Callable[..., None]) -> None:
    # Each form has a winner of its own: the best ragged trial may be worse than a portable one.
    portable, ragged = params(kept=4), params(kept={1: 8, 2: 4})
    runner = make_runner(study_of(), ALLOCATOR, by_key({key(portable): 0.1, key(ragged): 0.5}))
    run(runner, portable, ragged)
    first, second = (t.user_attrs["scores"] for t in finished(runner.study))
    assert first["target_bytes"] < second["target_bytes"]
    assert first["tokens_per_second"] > second["tokens_per_second"]
    assert states(runner) == [COMPLETE] * 2


def test_of_the_trials_before_only_complete_ones_stop_others() -> None:
    first, second, third = (params(criterion=c, kept=4) for c in ("reap", "mass", "paper"))
    runner = make_runner(study_of(), ALLOCATOR, by_key({key(first): 0.1, key(second): 0.3, key(third): 0.2}))
    one_by_one(runner, first, second, third)
    assert states(runner) == [COMPLETE, PRUNED, PRUNED]


def test_a_kl_that_is_not_a_number_ends_the_study_in_one_line() -> None:
    runner = make_runner(study_of(), ALLOCATOR, FakePool(lambda c: math.nan))
    with pytest.raises(UserError, match="not a number") as error:
        one_by_one(runner, params())
    assert key(params()) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_trials_of_a_round_are_scored_together_and_shared_out_to_the_workers(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, jobs = FakePool(lambda c: 1.0, size), []
    run = pool.run
    monkeypatch.setattr(pool, "run", lambda some: [jobs.append(some), run(some)][1])
    study = study_of()
    make_runner(study, ALLOCATOR, pool).run(ROUND)
    first = jobs[0]
    shares = [len(args[0]) for _, args in first]
    assert len(shares) <= size
    assert max(shares) == math.ceil(ROUND / size)
    assert sum(shares) == ROUND
    scored = [Candidate.from_json(text).key for _, args in first for text in args[0]]
    assert scored == [t.user_attrs["candidate"] for t in study.get_trials()]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_predictors_rank_correlation_is_of_trials_that_are_no_baselines(sign: int) -> None:
    def kl(candidate: Candidate) -> float:
        return 1.0 + 0.01 * sign * synthetic.additive(ALLOCATOR, ALLOCATOR.model.costs, candidate)

    runner = make_runner(study_of(), ALLOCATOR, FakePool(kl))
    runner.study.enqueue_trial(params(), user_attrs={"baseline": "uniform"})
    runner.run(5)
    assert runner.rank_correlation() is None
    runner.run(24)
    rho = runner.rank_correlation()
    assert rho is not None
    assert sign * rho > 0.95


def test_the_knapsack_learns_from_trials_that_are_stopped_early() -> None:
    allocator = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.1)
    space = allocator.space
    truth = synthetic.wrong_about(allocator.model.costs, seed=5)
    study = study_of(allocator, "knapsack")

    def kl(candidate: Candidate) -> float:
        return synthetic.additive(allocator, truth, candidate)

    make_runner(study, allocator, FakePool(kl)).run(24)
    trials = finished(study)
    scores = [t.user_attrs["scores"] for t in trials]
    assert all(s["target_bytes"] <= allocator.limit for s in scores)
    assert {t.state for t in trials} == {COMPLETE, PRUNED}
    start = min(kl(space.candidate(allocator.best(allocator.model.costs, form))) for form in space.forms)
    assert min(s["kl"] for s in scores) < 0.85 * start
