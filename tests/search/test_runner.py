"""Trials climb rungs of nested windows, only clear losers stop, slopes are measured where they are news."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from search.allocator import Allocator
from search.runner import ROUND, RUNGS, TrialRunner
from search.sampler import KnapsackSampler, make_sampler
from search.slope_book import SlopeBook
from search.stages import SEARCH_TOKENS
from search.study import finished, open_study
from spaces.candidate import Candidate
from spaces.errors import UserError
from tests.search import synthetic
from tests.search.fake_pool import SLOPE_PRICE, WINDOW, FakePool, SlopeRows, make_runner
from tests.spaces import tiny

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

ALLOCATOR = synthetic.allocator(tiny.space(num_hidden_layers=3), 0.5)
SPACE = ALLOCATOR.space
STEPS = list(itertools.pairwise((0, *RUNGS)))
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED


def study_of(allocator: Allocator = ALLOCATOR, sampler: str = "random", seed: int = 0) -> optuna.Study:
    study = open_study("s", optuna.storages.InMemoryStorage(), {})
    study.sampler = make_sampler(sampler, allocator, seed)
    return study


def params(kind: str = "Q4_K", criterion: str = "reap", kept: int | dict[int, int] = 8) -> dict[str, Any]:
    """Parameters whose size is set by `kind` and `kept`, and whose experts by `criterion`."""
    types = {t.name: kind if t.row % 256 == 0 else "Q8_0" for t in SPACE.inventory.quantizable}
    return SPACE.params(types, kept, criterion)


def key(p: dict[str, Any]) -> str:
    return SPACE.candidate(p).key


def by_key(table: dict[str, float], default: float = 1.0, **more: Any) -> FakePool:
    return FakePool(lambda candidate: table.get(candidate.key, default), **more)


def scrambled(candidate: Candidate) -> float:
    return 0.001 * (int(candidate.key, 16) % 997 + 1)


def one_by_one(runner: TrialRunner, *wanted: dict[str, Any]) -> None:
    """Runs every one in a round of its own."""
    for p in wanted:
        runner.study.enqueue_trial(p)
        runner.run(len(finished(runner.study)) + 1)


def together(runner: TrialRunner, *wanted: dict[str, Any]) -> None:
    """Runs them as one round."""
    for p in wanted:
        runner.study.enqueue_trial(p)
    runner.run(len(finished(runner.study)) + len(wanted))


def states(runner: TrialRunner) -> list[TrialState]:
    return [t.state for t in runner.study.get_trials()]


def steps(pool: FakePool, p: dict[str, Any]) -> list[tuple[int, int]]:
    """(first, last) token of every job on a candidate."""
    return [(first, last) for k, _, first, last in pool.scored if k == key(p)]


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


def test_a_trial_climbs_rungs_of_windows_that_hold_the_ones_before() -> None:
    assert list(RUNGS) == sorted(RUNGS)
    assert RUNGS[-1] == SEARCH_TOKENS
    pool = FakePool(lambda c: 1.0, spread=lambda c, w: 1.0 + w)  # a window's KL says which one it is
    runner = make_runner(study_of(), ALLOCATOR, pool)
    one_by_one(runner, params())
    assert steps(pool, params()) == STEPS
    (trial,) = finished(runner.study)
    assert trial.user_attrs["windows"]["kl"] == [1.0 + w for w in range(SEARCH_TOKENS // WINDOW)]


def test_a_clearly_worse_trial_of_the_same_size_is_stopped_on_the_first_rung() -> None:
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    pool = by_key({key(good): 0.1, key(bad): 0.2})
    runner = make_runner(study_of(), ALLOCATOR, pool)
    one_by_one(runner, good, bad)
    stopped = runner.study.get_trials()[1]
    assert stopped.state == PRUNED
    assert stopped.user_attrs["scores"]["kl"] == pytest.approx(0.2)
    assert stopped.user_attrs["scores"]["tokens"] == RUNGS[0]
    assert len(stopped.user_attrs["windows"]["kl"]) == RUNGS[0] // WINDOW
    assert (steps(pool, good), steps(pool, bad)) == (STEPS, STEPS[:1])


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize(
    ("other", "kl"),
    [
        (params(criterion="paper", kept=4), 0.05),  # better
        (params(criterion="paper", kept=4), 0.1004),  # worse by less than matters
        (params("IQ3_XXS", kept=4), 5.0),  # much worse, but smaller and faster
        (params(kept=4) | {"top_k": 1}, 5.0),  # as large, but faster
    ],
    ids=["better", "about-as-good", "smaller", "faster"],
)
def test_a_trial_that_no_other_beats_in_everything_goes_on(
    other: dict[str, Any], kl: float, run: Callable[..., None]
) -> None:
    good = params(kept=4)
    runner = make_runner(study_of(), ALLOCATOR, by_key({key(good): 0.1, key(other): kl}))
    run(runner, good, other)
    assert states(runner)[1] == COMPLETE
    assert states(runner)[0] == (PRUNED if kl < 0.1 and run is together else COMPLETE)


def test_what_decides_is_the_difference_on_the_same_windows() -> None:
    """Windows are hard or easy for all alike; where candidates differ by chance, nothing is clear early."""
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    table = {key(good): 0.1, key(bad): 0.102}  # a fiftieth
    hard = [math.exp(1.5 * x) for x in np.random.default_rng(0).standard_normal(SEARCH_TOKENS // WINDOW)]
    paired = make_runner(study_of(), ALLOCATOR, by_key(table, spread=lambda c, w: hard[w]))
    one_by_one(paired, good, bad)
    assert states(paired) == [COMPLETE, PRUNED]

    def chance(candidate: Candidate, window: int) -> float:
        flip = window % 2 == (candidate.key == key(good))
        return 1.5 if flip else 0.5

    loose = make_runner(study_of(), ALLOCATOR, by_key(table, spread=chance))
    one_by_one(loose, good, bad)
    assert states(loose) == [COMPLETE, COMPLETE]


def test_a_loser_that_shows_on_a_later_rung_is_stopped_there() -> None:
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    first = RUNGS[0] // WINDOW

    def late(candidate: Candidate, window: int) -> float:
        return 3.0 if candidate.key == key(bad) and window >= first else 1.0

    pool = by_key({}, spread=late)
    runner = make_runner(study_of(), ALLOCATOR, pool)
    one_by_one(runner, good, bad)
    assert states(runner) == [COMPLETE, PRUNED]
    assert steps(pool, bad) == STEPS[:2]


def test_trials_of_a_round_stop_each_other() -> None:
    worst, good, middle = (params(criterion=c, kept=4) for c in ("reap", "mass", "paper"))
    pool = by_key({key(worst): 0.3, key(good): 0.1, key(middle): 0.2})
    runner = make_runner(study_of(), ALLOCATOR, pool)
    together(runner, worst, good, middle)
    assert states(runner) == [PRUNED, COMPLETE, PRUNED]
    assert [steps(pool, p) for p in (worst, good, middle)] == [STEPS[:1], STEPS, STEPS[:1]]


def test_a_trial_beaten_on_the_last_rung_is_complete() -> None:
    good, bad = params(criterion="reap", kept=4), params(criterion="paper", kept=4)
    second = RUNGS[1] // WINDOW

    def late(candidate: Candidate, window: int) -> float:
        return 3.0 if candidate.key == key(bad) and window >= second else 1.0

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


@pytest.mark.parametrize("sampler", ["knapsack", "tpe"])
def test_the_number_of_workers_changes_no_result(sampler: str) -> None:
    def trials(size: int) -> tuple[list[tuple[dict[str, Any], TrialState, list[float] | None]], int]:
        study = study_of(sampler=sampler)
        pool = FakePool(scrambled, size, slopes=rows_of)
        runner = make_runner(study, ALLOCATOR, pool, slopes=True)
        runner.run(2 * ROUND + 1)
        assert bool(pool.sloped) == (sampler == "knapsack")
        return [(t.params, t.state, t.values) for t in study.get_trials()], runner.spent

    assert trials(1) == trials(7)


@pytest.mark.parametrize(
    ("size", "shares"), [(1, [8]), (2, [4, 4]), (3, [3, 3, 2]), (7, [2, 2, 2, 2]), (20, [1] * 8)]
)
def test_trials_of_a_round_are_scored_together_and_shared_out_to_the_workers(
    size: int, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, jobs = FakePool(lambda c: 1.0, size), []
    run = pool.run
    monkeypatch.setattr(pool, "run", lambda some: [jobs.append(some), run(some)][1])
    study = study_of()
    make_runner(study, ALLOCATOR, pool).run(ROUND)
    first = jobs[0]
    assert [len(args[0]) for _, args in first] == shares
    scored = [Candidate.from_json(text).key for _, args in first for text in args[0]]
    assert scored == [t.user_attrs["candidate"] for t in study.get_trials()]


def rows_of(candidate: Candidate | None) -> SlopeRows:
    """Slopes that say nothing changes."""
    return [(t.name, kind, 0.0, 1e-6) for t in SPACE.inventory.quantizable for kind in SPACE.ladder(t)]


def sloping(kl: Callable[[Candidate], float] = scrambled) -> FakePool:
    return FakePool(kl, slopes=rows_of)


def test_every_token_is_counted_that_of_slopes_too() -> None:
    pool = sloping()
    runner = make_runner(study_of(sampler="knapsack"), ALLOCATOR, pool, slopes=True)
    runner.run(3 * ROUND)
    assert pool.sloped
    assert PRUNED in states(runner)
    scored = sum(last - first for _, _, first, last in pool.scored)
    assert runner.spent == scored + SLOPE_PRICE * len(pool.sloped)


def test_slopes_are_measured_where_the_incumbent_of_a_form_has_improved_enough() -> None:
    first, little, much, worse = (params(k, kept=4) for k in ("Q3_K", "Q4_K", "Q5_K", "Q6_K"))
    ragged = params(kept={1: 8, 2: 4})
    table = {key(first): 0.2, key(little): 0.199, key(much): 0.1, key(worse): 0.3, key(ragged): 0.4}
    pool = by_key(table, 9.0, slopes=rows_of)
    runner = make_runner(study_of(sampler="knapsack"), ALLOCATOR, pool, slopes=True)
    measured = []
    # What a round finds is seen by the next one.
    for p in (first, little, worse, much, ragged, worse):
        one_by_one(runner, p)
        measured.append(list(pool.sloped))
    assert measured == [
        [],
        [key(first)],
        [key(first)],
        [key(first)],
        [key(first), key(much)],
        [key(first), key(much), key(ragged)],
    ]


def test_slopes_are_found_again_in_their_folder(tmp_path: Path) -> None:
    table = {key(params()): 0.1}
    study, pool = study_of(sampler="knapsack"), by_key(table, slopes=rows_of)
    study.sampler = KnapsackSampler(ALLOCATOR, 0, SlopeBook(tmp_path))
    one_by_one(make_runner(study, ALLOCATOR, pool, slopes=True), params(), params("Q5_K"))
    assert pool.sloped == [key(params())]

    book, again = SlopeBook(tmp_path), by_key(table, slopes=rows_of)
    study.sampler = KnapsackSampler(ALLOCATOR, 0, book)
    one_by_one(make_runner(study, ALLOCATOR, again, slopes=True), params("Q6_K"))
    assert not again.sloped
    assert book.get(key(params())) == {(n, k): (a, b) for n, k, a, b in rows_of(None)}
    assert book.get(key(params("Q6_K"))) is None
    empty = SlopeBook(tmp_path / "other")
    assert empty.get(key(params())) is None


@pytest.mark.parametrize(("sampler", "slopes"), [("random", True), ("knapsack", False)])
def test_no_slopes_are_measured_where_none_can_be_or_none_are_used(sampler: str, slopes: bool) -> None:
    pool = sloping()
    runner = make_runner(study_of(sampler=sampler), ALLOCATOR, pool, slopes=slopes)
    runner.run(2 * ROUND)
    assert not pool.sloped


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
