"""Slopes are measured where they are news, once, and for no more than may be spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from search.runner import ROUND, TrialRunner
from search.sampler import KnapsackSampler
from search.slope_book import SlopeBook
from spaces.candidate import Candidate
from tests.search.fake_pool import FakePool, make_runner
from tests.search.rounds import (
    ALLOCATOR,
    PRUNED,
    by_key,
    key,
    one_by_one,
    params,
    rows_of,
    scrambled,
    states,
    study_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


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


def sloping(kl: Callable[[Candidate], float] = scrambled) -> FakePool:
    return FakePool(kl, slopes=rows_of)


def test_every_token_is_counted_that_of_slopes_too() -> None:
    pool = sloping()
    runner = make_runner(study_of(sampler="knapsack"), ALLOCATOR, pool, slopes=True)
    runner.run(3 * ROUND)
    assert pool.sloped
    assert PRUNED in states(runner)
    assert runner.spent == pool.tokens


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
    assert book.get(key(params())) == {(n, k): (a, b) for n, k, a, b in rows_of()}
    assert book.get(key(params("Q6_K"))) is None
    empty = SlopeBook(tmp_path / "other")
    assert empty.get(key(params())) is None


@pytest.mark.parametrize(("sampler", "slopes"), [("random", True), ("knapsack", False)])
def test_no_slopes_are_measured_where_none_can_be_or_none_are_used(sampler: str, slopes: bool) -> None:
    pool = sloping()
    runner = make_runner(study_of(sampler=sampler), ALLOCATOR, pool, slopes=slopes)
    runner.run(2 * ROUND)
    assert not pool.sloped


def found(kl: float = 0.1) -> tuple[TrialRunner, FakePool]:
    """A runner that knows one trial, and slopes nowhere."""
    pool = by_key({key(params()): kl}, slopes=rows_of)
    runner = make_runner(study_of(sampler="knapsack"), ALLOCATOR, pool, slopes=True)
    one_by_one(runner, params())
    assert not pool.sloped
    return runner, pool


def test_slopes_are_not_measured_beyond_the_allowance() -> None:
    runner, pool = found()
    begun = runner.spent
    runner.measure_slopes()
    price = runner.spent - begun
    assert pool.sloped == [key(params())]
    runner, pool = found()
    for allowance in (-1, 0, price // 2, price - 1):
        runner.measure_slopes(allowance)
        assert not pool.sloped
    runner.measure_slopes(2 * price)
    assert pool.sloped == [key(params())]
    assert runner.spent - begun == price
    for _ in range(2):
        runner.measure_slopes()
    assert pool.sloped == [key(params())]


def test_a_study_that_goes_on_with_its_book_measures_only_what_is_better(tmp_path: Path) -> None:
    good, better = params(kept=4), params(criterion="paper", kept=4)
    pool = by_key({key(good): 0.2, key(better): 0.1}, slopes=rows_of)
    study = study_of(sampler="knapsack")

    def runner() -> TrialRunner:
        study.sampler = KnapsackSampler(ALLOCATOR, 0, SlopeBook(tmp_path))
        return make_runner(study, ALLOCATOR, pool, slopes=True)

    one_by_one(runner(), good)
    for _ in range(3):
        runner().measure_slopes()
    assert pool.sloped == [key(good)]
    one_by_one(runner(), better)
    for _ in range(3):
        runner().measure_slopes()
    assert pool.sloped == [key(good), key(better)]
