"""Every sampler keeps one contract: valid candidates within the budget, repeatable, in parallel."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from compression.families import open_inventory
from search.allocator import Allocator
from search.posterior import Posterior
from search.sampler import KnapsackSampler, make_sampler
from search.sampler_names import SAMPLERS
from spaces.errors import UserError
from spaces.space import PORTABLE, RAGGED
from tests.search import synthetic
from tests.search.synthetic import Game
from tests.spaces import tiny

SMALL = synthetic.allocator(tiny.space(num_hidden_layers=2))


def play(name: str, allocator: Allocator, trials: int = 12, seed: int = 3) -> list[dict[str, Any]]:
    """Parameters of the trials a sampler asks for, four asked before any is told."""
    truth = synthetic.wrong_about(allocator.model.costs, seed=1)
    game = Game(make_sampler(name, allocator, seed), allocator, truth)
    return [t.params for t in game.play(trials, batch=4)]


def check(allocator: Allocator, params: dict[str, Any]) -> None:
    space = allocator.space
    assert params.keys() == space.distributions.keys()
    for name, distribution in space.distributions.items():
        assert params[name] in distribution.choices  # type: ignore[attr-defined]
    space.candidate(params).validate(space.inventory)
    assert synthetic.target_bytes(allocator, params) <= allocator.limit


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_proposal_is_complete_valid_and_within_the_budget(name: str) -> None:
    for params in play(name, SMALL, trials=8 if name == "gp" else 24):
        check(SMALL, params)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_the_same_proposals_again_and_another_gives_others(name: str) -> None:
    trials = 8 if name == "gp" else 16
    first = play(name, SMALL, trials)
    assert play(name, SMALL, trials) == first
    assert play(name, SMALL, trials, seed=4) != first


@pytest.mark.parametrize("name", SAMPLERS)
def test_proposals_asked_for_together_differ(name: str) -> None:
    space = SMALL.space
    asked = play(name, SMALL, trials=4)
    assert len({space.candidate(params).key for params in asked}) == 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_both_forms_are_proposed_where_the_runtime_takes_both(name: str) -> None:
    allocator = synthetic.allocator(tiny.space())
    forms = {allocator.space.candidate(p).portable for p in play(name, allocator, trials=8)}
    assert forms == {True, False}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_runtime_of_one_count_only_gets_portable_proposals(name: str) -> None:
    allocator = synthetic.allocator(tiny.space("llama.cpp", **tiny.GROUPED))
    for params in play(name, allocator, trials=4):
        check(allocator, params)
        assert allocator.space.candidate(params).portable


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_budget_of_a_larger_target_is_kept(name: str) -> None:
    allocator = synthetic.allocator(tiny.space(), target=open_inventory("deepseek-v3"))
    for params in play(name, allocator, trials=4):
        check(allocator, params)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_tightest_budget_that_can_be_met_is_met(name: str) -> None:
    # A ragged file's header is longer, so only portable candidates fit here.
    allocator = synthetic.allocator(tiny.space())
    tightest = Allocator(allocator.space, allocator.model, allocator.carry, allocator.smallest())
    for params in play(name, tightest, trials=8):
        check(tightest, params)


def test_enqueued_parameters_are_taken_as_they_are() -> None:
    space = SMALL.space
    types = {t.name: "BF16" for t in space.inventory.quantizable}
    wanted = space.params(types, space.inventory.experts, "reap")
    for name in ("knapsack", "tpe", "nsgaii", "random"):
        game = Game(make_sampler(name, SMALL, 0), SMALL, SMALL.model.costs)
        game.study.enqueue_trial(wanted)
        assert game.play(1)[0].params == wanted


def test_an_unknown_sampler_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'knapsack'") as error:
        make_sampler("knapsak", SMALL, 0)
    assert "--sampler" in str(error.value)
    assert all(name in str(error.value) for name in SAMPLERS)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_proposal_that_fits_is_left_alone(name: str) -> None:
    roomy = Allocator(SMALL.space, SMALL.model, SMALL.carry, 10**12)
    tight = play(name, SMALL, trials=4)
    free = play(name, roomy, trials=4)
    # The same draws: where one fits the tight budget too, nothing was moved.
    fitting = [i for i, p in enumerate(free) if synthetic.target_bytes(SMALL, p) <= SMALL.limit]
    assert [tight[i] for i in fitting] == [free[i] for i in fitting]
    assert any(a != b for a, b in zip(tight, free, strict=True))


def test_the_knapsack_finds_in_thirty_trials_what_the_others_do_not() -> None:
    for seed in (0, 1):
        allocator = synthetic.allocator(tiny.space(), seed=seed)
        truth = synthetic.wrong_about(allocator.model.costs, seed=seed + 100)
        best = {}
        for name in ("knapsack", "random", "tpe", "nsgaii"):
            game = Game(make_sampler(name, allocator, seed), allocator, truth)
            best[name] = min(game.true_kl(t.params) for t in game.play(32))
        assert best["knapsack"] < 0.7 * min(v for k, v in best.items() if k != "knapsack"), best
        # And it leaves its own start behind, which believed the measured costs.
        start = min(game.true_kl(allocator.best(allocator.model.costs, f)) for f in (PORTABLE, RAGGED))
        assert best["knapsack"] < 0.95 * start


def observations(allocator: Allocator, truth: np.ndarray, trials: int, seed: int) -> tuple[Any, np.ndarray]:
    """(columns, KL) of random sets of parameters."""
    rng = random.Random(seed)
    columns = [allocator.model.columns(tiny.random_params(allocator.space, rng)) for _ in range(trials)]
    return columns, np.array([truth[c].sum() for c in columns])


def test_without_trials_the_costs_are_the_measured_ones() -> None:
    costs = SMALL.model.costs
    posterior = Posterior(costs, [], np.array([]), np.array([]))
    assert posterior.mean() == pytest.approx(costs)
    rng = np.random.default_rng(0)
    draws = np.array([posterior.sample(rng) for _ in range(400)])
    spread = draws.std(axis=0)
    assert np.abs(draws.mean(axis=0) - costs) == pytest.approx(0, abs=0.3 * spread.max())
    assert (spread > 0).all()
    # Dear options are the ones in doubt.
    assert spread[costs.argmax()] > 10 * spread[costs.argmin()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trials_move_the_costs_towards_the_truth(seed: int) -> None:
    costs = SMALL.model.costs
    truth = synthetic.wrong_about(costs, seed, spread=0.4)
    seen, kl = observations(SMALL, truth, 40, seed)
    unseen, expected = observations(SMALL, truth, 40, seed + 1000)
    mean = Posterior(costs, seen, kl, 0.01 * kl).mean()

    def error(of: np.ndarray) -> float:
        predicted = np.array([of[c].sum() for c in unseen])
        return float(np.sqrt(np.mean((predicted - expected) ** 2)))

    assert error(mean) < 0.8 * error(costs)
    assert np.abs(mean - truth).sum() < np.abs(costs - truth).sum()


def test_a_sum_that_is_wrong_as_a_whole_moves_what_no_trial_had() -> None:
    costs = SMALL.model.costs
    seen, kl = observations(SMALL, 1.5 * costs, 10, seed=0)
    mean = Posterior(costs, seen, kl, 0.01 * kl).mean()
    never = np.setdiff1d(np.arange(len(costs)), np.concatenate(seen))
    dear = never[costs[never] > 1e-4]
    assert len(dear)
    assert (mean[dear] > 1.05 * costs[dear]).all()


def test_what_was_seen_is_in_less_doubt_than_before() -> None:
    costs = SMALL.model.costs
    seen, kl = observations(SMALL, costs, 5, seed=0)
    before = Posterior(costs, [], np.array([]), np.array([]))
    after = Posterior(costs, seen, kl, 0.01 * kl)

    def spread(posterior: Posterior) -> float:
        rng = np.random.default_rng(0)
        return float(np.std([posterior.sample(rng)[seen[0]].sum() for _ in range(200)]))

    assert spread(after) < 0.5 * spread(before)


def test_draws_scatter_about_the_mean() -> None:
    costs = SMALL.model.costs
    seen, kl = observations(SMALL, synthetic.wrong_about(costs, 0), 20, seed=0)
    posterior, rng = Posterior(costs, seen, kl, 0.05 * kl), np.random.default_rng(0)
    draws = np.array([posterior.sample(rng) for _ in range(1000)])
    standard_error = draws.std(axis=0) / np.sqrt(1000)
    assert (np.abs(draws.mean(axis=0) - posterior.mean()) < 5 * standard_error).all()


def test_a_noisy_trial_teaches_less_than_a_clean_one() -> None:
    costs = SMALL.model.costs
    seen, kl = observations(SMALL, 2 * costs, 1, seed=0)
    clean = Posterior(costs, seen, kl, 0.001 * kl).mean()
    noisy = Posterior(costs, seen, kl, 10.0 * kl).mean()
    assert clean[seen[0]].sum() > 1.3 * costs[seen[0]].sum()
    assert noisy[seen[0]].sum() == pytest.approx(costs[seen[0]].sum(), rel=0.05)


def test_early_stopped_trials_teach_too_and_failed_ones_do_not() -> None:
    sampler = KnapsackSampler(SMALL)
    game = Game(sampler, SMALL, 3 * SMALL.model.costs)
    prior = sampler.posterior([]).mean()
    for state in (TrialState.FAIL, TrialState.PRUNED):
        trial = game.study.ask(SMALL.space.distributions)
        kl = game.true_kl(trial.params)
        trial.set_user_attr("scores", {"kl": kl, "kl_se": 0.01 * kl})
        trial.set_user_attr("windows", {"kl": [kl] * 4})
        game.study.tell(trial, state=state)
        columns = SMALL.model.columns(trial.params)
        believed = sampler.posterior(game.study.get_trials(deepcopy=False)).mean()[columns].sum()
        if state == TrialState.FAIL:
            assert believed == pytest.approx(prior[columns].sum())
        else:
            assert believed > 1.3 * prior[columns].sum()
