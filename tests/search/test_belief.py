"""What a study believes: a curve, costs, interactions, slopes; each learned from what tells of it."""

from __future__ import annotations

import random
from copy import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.allocator import Allocator
from search.belief import Belief, Seen, observed
from search.costs import CostModel
from search.interactions import Interactions
from search.posterior import Curve, Posterior
from search.sampler import KnapsackSampler
from search.slope_book import Slopes
from spaces.space import PORTABLE
from tests.search import synthetic
from tests.search.synthetic import Game
from tests.spaces import tiny

SMALL = synthetic.allocator(tiny.space(num_hidden_layers=2))
MIDDLE = synthetic.allocator(tiny.space(num_hidden_layers=5))
SPACE, MODEL = MIDDLE.space, MIDDLE.model


def random_columns(allocator: Allocator, rng: random.Random) -> np.ndarray:
    return np.array(allocator.model.columns(tiny.random_params(allocator.space, rng)))


def seen_by(
    allocator: Allocator, truth: np.ndarray, curve: Curve, weights: np.ndarray, trials: int, seed: int
) -> list[Seen]:
    """Random configs, and what they would show were `truth`, `curve` and `weights` true."""
    rng, interactions = random.Random(seed), Interactions(allocator.model)
    out = []
    for number in range(trials):
        columns = random_columns(allocator, rng)
        features = interactions.features(columns)
        damage = float(curve.damage(truth[columns].sum() + features @ weights))
        out.append(Seen(number, str(number), columns, features, damage, 0.0, True, True))
    return out


@settings(deadline=None, max_examples=40)
@given(st.floats(-0.6, 0.6), st.floats(0.85, 1.4), st.integers(0, 2**32))
def test_the_curve_of_many_trials_is_recovered(a: float, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sums = rng.lognormal(-1, 1, 400)
    fitted = Curve.fit(sums, np.exp(a) * sums**b * rng.lognormal(0, 0.05, 400))
    assert fitted.a == pytest.approx(a, abs=0.03)
    assert fitted.b == pytest.approx(b, abs=0.03)


@settings(deadline=None, max_examples=60)
@given(st.floats(-1, 1), st.floats(0.3, 2.0), st.floats(1e-3, 50.0))
def test_the_curve_is_inverted_and_has_the_slope_it_says(a: float, b: float, at: float) -> None:
    curve = Curve(a, b)
    assert float(curve.sums(curve.damage(at))) == pytest.approx(at)
    step = 1e-5 * at
    slope = (curve.damage(at + step) - curve.damage(at - step)) / (2 * step)
    assert curve.slope(at) == pytest.approx(float(slope), rel=1e-4)


def test_without_trials_the_curve_is_the_one_expected_and_few_trials_move_it_little() -> None:
    nothing = np.array([])
    prior = Curve.fit(nothing, nothing)
    assert (prior.a, prior.b) == pytest.approx((0.0, 1.15))
    one, many = (Curve.fit(np.full(n, 0.5), np.full(n, 5.0)) for n in (1, 100))
    assert prior.damage(0.5) < one.damage(0.5) < many.damage(0.5)
    assert float(many.damage(0.5)) == pytest.approx(5.0, rel=0.02)


def test_trials_without_damage_do_not_break_the_curve() -> None:
    sums, damage = np.array([0.0, 0.5, 1.0, -0.1]), np.array([0.0, 0.5, 1.0, 0.2])
    assert Curve.fit(sums, damage) == Curve.fit(sums[1:3], damage[1:3])


def even_model(seed: int) -> CostModel:
    """Costs that are all of one size, so that no derivative is bounded."""
    model = copy(MODEL)
    model.costs = np.random.default_rng(seed).uniform(0.5, 1.5, len(MODEL.costs))
    return model


def test_every_pair_of_neighbours_and_every_moe_layer_interacts() -> None:
    interactions = Interactions(MODEL)
    layers, moe = SPACE.inventory.layers, len(SPACE.inventory.moe_layers)
    assert len(interactions.doubt) == moe + 1 + layers - 1 + 1
    columns = random_columns(MIDDLE, random.Random(0))
    features = interactions.features(columns)
    assert len(features) == len(interactions.doubt)
    assert features[moe] == pytest.approx(features[:moe].sum())
    assert features[-1] == pytest.approx(features[moe + 1 : -1].sum())
    groups = interactions.groups(columns)
    inside = [c for (name, _), c in MODEL.index.items() if c in set(columns) and name.startswith("blk.")]
    assert groups.sum() == pytest.approx(MODEL.costs[inside].sum())
    first = SPACE.inventory.moe_layers[0]
    assert features[0] == pytest.approx(np.sqrt(groups[first, 0] * groups[first, 1]))
    assert features[moe + 1] == pytest.approx(np.sqrt(groups[0].sum() * groups[1].sum()))


def test_a_layer_that_keeps_all_its_experts_has_no_interaction_of_pruning() -> None:
    types = {t.name: SPACE.ladder(t)[0] for t in SPACE.inventory.quantizable}
    layers = SPACE.inventory.moe_layers
    kept = dict.fromkeys(layers, 4) | {layers[1]: 8}
    features = Interactions(MODEL).features(MODEL.columns(SPACE.params(types, kept, "reap")))
    assert features[1] == 0.0
    assert (np.delete(features, 1) > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_linearised_costs_have_the_derivatives_of_sum_and_interactions(seed: int) -> None:
    model, rng = even_model(seed), np.random.default_rng(seed)
    interactions = Interactions(model)
    weights = 0.2 * rng.standard_normal(len(interactions.doubt))
    at = random_columns(MIDDLE, random.Random(seed))
    found = interactions.linearised(model.costs, weights, at)
    for column in at:
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = even_model(seed)
            moved.costs[column] += sign * step
            values.append(moved.costs[at].sum() + Interactions(moved).features(at) @ weights)
        derivative = (values[0] - values[1]) / (2 * step)
        assert found[column] / model.costs[column] == pytest.approx(max(derivative, 0.1), rel=1e-5)


def test_linearised_costs_stay_finite_where_nothing_is_damaged() -> None:
    interactions = Interactions(MODEL)
    best = {t.name: "BF16" for t in SPACE.inventory.quantizable}
    at = MODEL.columns(SPACE.params(best, SPACE.inventory.experts, "reap"))
    weights = np.full(len(interactions.doubt), 5.0)
    assert np.isfinite(interactions.linearised(MODEL.costs, weights, at)).all()
    assert interactions.linearised(MODEL.costs, 0 * weights, at) == pytest.approx(MODEL.costs)


TENSOR = next(t for t in SPACE.inventory.quantizable if t.per_expert)
LADDER = SPACE.ladder(TENSOR)


HERE = 10


def here() -> np.ndarray:
    """Columns of a config with a tensor at `HERE` on its ladder, the others in the middle."""
    types = {t.name: SPACE.ladder(t)[len(SPACE.ladder(t)) // 2] for t in SPACE.inventory.quantizable}
    params = SPACE.params({**types, TENSOR.name: LADDER[HERE]}, 6, "reap")
    return np.array(MODEL.columns(params))


def believed(slopes: Slopes | None) -> np.ndarray:
    """Costs near a config."""
    belief = Belief(MODEL, Interactions(MODEL), [], here(), None if slopes is None else (here(), slopes))
    return belief.draw(np.random.default_rng(0), 0.0)


def option(place: int) -> int:
    return MODEL.index[TENSOR.name, LADDER[place]]


def true_slope(place: int) -> float:
    """What the costs say that a step changes KL by."""
    belief = Belief(MODEL, Interactions(MODEL), [], None)
    rate = belief.curve.slope(float(MODEL.costs[here()].sum()))
    return rate * float(MODEL.costs[option(place)] - MODEL.costs[option(HERE)])


@pytest.mark.parametrize("place", [HERE - 1, HERE + 1])
def test_slopes_move_the_cost_of_their_option_towards_what_they_say_and_no_other(place: int) -> None:
    plain, own = believed(None), true_slope(place)
    size = abs(own)
    dearer = believed({(TENSOR.name, LADDER[place]): (own + size, 0.5 * size)})
    cheaper = believed({(TENSOR.name, LADDER[place]): (own - size, -0.5 * size)})
    assert cheaper[option(place)] < plain[option(place)] < dearer[option(place)]
    others = np.delete(np.arange(len(plain)), option(place))
    assert cheaper[others] == pytest.approx(plain[others])
    assert dearer[others] == pytest.approx(plain[others])
    assert believed({})[option(place)] == plain[option(place)]


def test_slopes_weigh_less_the_further_a_step_reaches() -> None:
    plain = believed(None)

    def told(place: int) -> float:
        """Share of what is told that is believed."""
        own = MODEL.costs[option(place)] - MODEL.costs[option(HERE)]
        slope = 1.5 * true_slope(place)
        moved = believed({(TENSOR.name, LADDER[place]): (slope, 0.0)})[option(place)] - plain[option(place)]
        return float(abs(moved / own))

    near, far, farther = told(HERE - 1), told(HERE - 4), told(0)
    assert near > 2 * far > 2 * farther > 0


@pytest.mark.parametrize("steep", [1e9, -1e9])
def test_a_slope_out_of_range_is_clipped(steep: float) -> None:
    base, own = MODEL.costs[option(HERE)], MODEL.costs[option(HERE - 1)] - MODEL.costs[option(HERE)]
    moved = believed({(TENSOR.name, LADDER[HERE - 1]): (steep, 0.0)})[option(HERE - 1)] - base
    assert -3 * base <= moved <= 4 * own + 3 * base
    milder = believed({(TENSOR.name, LADDER[HERE - 1]): (steep / 1e3, 0.0)})[option(HERE - 1)] - base
    assert milder == pytest.approx(moved)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_belief_predicts_unseen_configs_better_than_the_sum_of_costs(seed: int) -> None:
    interactions = Interactions(MODEL)
    rng = np.random.default_rng(seed)
    truth = synthetic.wrong_about(MODEL.costs, seed, 0.3)
    curve, weights = Curve(0.3, 1.2), 0.3 * np.abs(rng.standard_normal(len(interactions.doubt)))
    belief = Belief(MODEL, interactions, seen_by(MIDDLE, truth, curve, weights, 80, seed))
    unseen = seen_by(MIDDLE, truth, curve, weights, 60, seed + 1000)

    def error(predicted: list[float]) -> float:
        return float(np.sqrt(np.mean(np.log(np.array(predicted) / [s.damage for s in unseen]) ** 2)))

    by_belief = error([belief.predict(s.columns, s.features) for s in unseen])
    by_curve = error([float(belief.curve.damage(MODEL.costs[s.columns].sum())) for s in unseen])
    by_sum = error([float(MODEL.costs[s.columns].sum()) for s in unseen])
    assert by_belief < 0.9 * by_curve < 0.9 * by_sum


def test_of_many_trials_the_best_and_the_newest_are_learned_from() -> None:
    seen = seen_by(SMALL, SMALL.model.costs, Curve(), np.zeros(4), 700, 0)
    belief = Belief(SMALL.model, Interactions(SMALL.model), seen)
    learned = len(belief.posterior.observed)
    assert learned < 300
    # Ones in the middle change nothing; the best one and the newest one do.
    order = sorted(seen, key=lambda s: s.damage)
    middle = next(s for s in order[350:] if s.number < 350)
    probe = order[0]
    expected = belief.predict(probe.columns, probe.features)
    for dropped, same in ((middle, True), (order[0], False), (seen[-1], False)):
        rest = [s for s in seen if s is not dropped]
        found = Belief(SMALL.model, Interactions(SMALL.model), rest).predict(probe.columns, probe.features)
        assert (found == expected) == same


def told(state: TrialState, *rungs: list[float]) -> FrozenTrial:
    """A trial that climbed so many rungs, of 512 tokens and twice as many each."""
    attributes: dict[str, Any] = {
        "scores": {"kl": float(np.mean(rungs[-1]))},
        "rungs": {str(512 * 2**i): kl for i, kl in enumerate(rungs)},
    }
    values = [1.0] if state == TrialState.COMPLETE else None
    return create_trial(
        state=state, values=values, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)},
        user_attrs=attributes,
    )  # fmt: skip


def numbered(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    for number, trial in enumerate(trials):
        trial.number = number
    return trials


def test_an_early_stopped_trial_is_scaled_to_the_text_complete_ones_saw() -> None:
    """The whole text is twice as hard as the first rung, and four fifths as hard as the second."""
    whole = [told(TrialState.COMPLETE, [0.1 * i] * 4, [0.25 * i] * 4, [0.2 * i] * 8) for i in (1, 2, 3)]
    short, longer = told(TrialState.PRUNED, [0.5] * 4), told(TrialState.PRUNED, [0.2] * 4, [0.5] * 4)
    failed = create_trial(state=TrialState.FAIL)
    rows = observed(numbered([whole[0], short, failed, *whole[1:], longer]))
    assert [t.number for t, _, _ in rows] == [0, 1, 3, 4, 5]
    assert [kl for _, kl, _ in rows] == pytest.approx([0.2, 1.0, 0.4, 0.6, 0.4])
    assert [noise > 0 for _, _, noise in rows] == [False, True, False, False, True]
    alone = observed(numbered([told(TrialState.PRUNED, [0.5] * 4)]))
    assert alone[0][1:] == (0.5, pytest.approx(0.05))


def test_early_stopped_trials_teach_too_and_failed_ones_do_not() -> None:
    sampler = KnapsackSampler(SMALL)
    game = Game(sampler, SMALL, 3 * SMALL.model.costs)
    for state in (TrialState.FAIL, TrialState.PRUNED):
        trial = game.study.ask(SMALL.space.distributions)
        before = sampler.predict([], trial.params)
        kl = game.true_kl(trial.params)
        trial.set_user_attr("scores", {"kl": kl, "kl_se": 0.01 * kl})
        trial.set_user_attr("rungs", {"1024": [kl] * 4})
        game.study.tell(trial, state=state)
        believed = sampler.predict(game.study.get_trials(deepcopy=False), trial.params)
        assert (believed > 1.3 * before) == (state == TrialState.PRUNED)


def test_the_incumbent_is_the_best_complete_trial_of_its_form() -> None:
    sampler = KnapsackSampler(SMALL)
    columns, features = np.array([0]), np.array([0.0])

    def seen(number: int, damage: float, complete: bool, portable: bool) -> Seen:
        return Seen(number, str(number), columns, features, damage, 0.0, complete, portable)

    trials = [
        seen(0, 0.3, True, True), seen(1, 0.1, False, True), seen(2, 0.2, True, True),
        seen(3, 0.05, True, False), seen(4, 0.2, True, True),
    ]  # fmt: skip
    best = sampler.incumbent(trials, PORTABLE)
    assert best is not None
    assert best.number == 2
    assert sampler.incumbent(trials[:3], "ragged") is None


def test_the_kl_where_slopes_are_known_is_the_best_one_of_a_form() -> None:
    sampler = KnapsackSampler(SMALL)
    trials = [
        Seen(i, str(i), np.array([0]), np.array([0.0]), damage, 0.0, complete, portable)
        for i, (damage, complete, portable) in enumerate(
            [(0.3, True, True), (0.1, False, True), (0.2, True, True), (0.4, True, False), (0.1, True, True)]
        )
    ]
    assert sampler.last_sloped(trials, PORTABLE) == np.inf
    for number in range(3):
        sampler.slopes.put(str(number), {})
    assert sampler.last_sloped(trials, PORTABLE) == 0.2
    assert sampler.last_sloped(trials, "ragged") == np.inf
    sampler.slopes.put("3", {})
    assert sampler.last_sloped(trials, "ragged") == 0.4


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
