"""Draws are near-optimal and always fit; exchanges never spend more than there is nor make anything worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.allocator import Allocator
from search.relaxation import improve
from spaces.allocation import InfeasibleError
from spaces.space import PORTABLE, RAGGED
from tests.search import synthetic
from tests.search.test_allocator import CASES, FORMS, FRACTIONS, SEEDS, case, drawn, drawn_top_k, with_limit
from tests.spaces import tiny


def cost_of(allocator: Allocator, costs: np.ndarray, params: dict[str, object]) -> float:
    return float(costs[allocator.model.columns(params)].sum())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CASES), FORMS, FRACTIONS, SEEDS)
def test_a_draw_is_a_valid_candidate_within_the_limit_and_never_beats_the_best(
    name: str, form: str, fraction: float, seed: int
) -> None:
    allocator = with_limit(name, fraction)
    space, costs = allocator.space, drawn(allocator.model.costs, seed)
    top_k = drawn_top_k(space, seed)
    params = allocator.draw(costs, form, top_k)
    assert params.keys() == space.distributions.keys()
    candidate = space.candidate(params)
    candidate.validate(space.inventory)
    assert synthetic.target_bytes(allocator, params) <= allocator.limit
    if form == PORTABLE:
        assert candidate.portable
    best = allocator.best(costs, form, top_k)
    if top_k is None:
        least = cost_of(allocator, costs, best)
        assert cost_of(allocator, costs, params) >= least - 1e-9 * abs(least)


DEEP = synthetic.allocator(tiny.space(num_hidden_layers=8), 0.15)


def deep(fraction: float) -> Allocator:
    """An allocator of more decisions: one of few has steps too large for a draw to come close."""
    smallest = DEEP.smallest()
    room = int(fraction * (synthetic.full_size(DEEP.space, DEEP.carry.target) - smallest))
    return Allocator(DEEP.space, DEEP.model, DEEP.carry, smallest + 4096 + room)


@settings(deadline=None, max_examples=25)
@given(FORMS, st.floats(0.02, 0.3), SEEDS)
def test_a_draw_costs_hardly_more_than_the_best(form: str, fraction: float, seed: int) -> None:
    allocator = deep(fraction)
    # What a tensor or a layer weighs is random; along its own ladder costs fall as they do.
    costs = synthetic.cost_model(allocator.space, seed % 1000).costs
    found = cost_of(allocator, costs, allocator.draw(costs, form))
    assert found <= 1.05 * cost_of(allocator, costs, allocator.best(costs, form))


def test_draws_are_on_average_within_half_a_percent_of_the_best() -> None:
    ratios = []
    for seed in range(8):
        costs = synthetic.wrong_about(DEEP.model.costs, seed, 0.3)
        for form in (PORTABLE, RAGGED):
            found = cost_of(DEEP, costs, DEEP.draw(costs, form))
            ratios.append(found / cost_of(DEEP, costs, DEEP.best(costs, form)))
    assert np.mean(ratios) < 1.005, ratios


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(CASES), FORMS, st.floats(0.01, 1.0), SEEDS)
def test_a_share_of_the_limit_is_kept(name: str, form: str, share: float, seed: int) -> None:
    allocator = with_limit(name, 0.3)
    costs = drawn(allocator.model.costs, seed)
    part = Allocator(allocator.space, allocator.model, allocator.carry, int(share * allocator.limit))
    try:
        part.best(costs, form)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            allocator.draw(costs, form, share=share)
    else:
        assert synthetic.target_bytes(allocator, allocator.draw(costs, form, share=share)) <= part.limit


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_size_is_drawn_exactly_and_one_byte_less_is_not(name: str) -> None:
    base = case(name)
    space, model, carry, smallest = base.space, base.model, base.carry, base.smallest()
    for seed in range(5):
        costs = drawn(model.costs, seed)
        found = Allocator(space, model, carry, smallest).draw(costs, PORTABLE)
        assert synthetic.target_bytes(base, found) == smallest
        for form in (PORTABLE, RAGGED):
            with pytest.raises(InfeasibleError):
                Allocator(space, model, carry, smallest - 1).draw(costs, form)


def test_a_draw_with_room_for_everything_takes_nothing_away() -> None:
    allocator = with_limit("itself", 1.0)
    for form in (PORTABLE, RAGGED):
        params = allocator.draw(allocator.model.costs, form)
        assert allocator.model.predict(params) == 0.0


def test_drawn_active_experts_are_as_asked_for_and_no_more_than_are_kept() -> None:
    allocator = with_limit("grouped", 0.2)
    space, costs = allocator.space, allocator.model.costs
    layers = space.inventory.moe_layers
    asked = dict(zip(layers, (1, 4, 2), strict=True))
    ragged = space.candidate(allocator.draw(costs, RAGGED, asked))
    assert {m.layer: m.top_k for m in ragged.layers} == asked
    portable = space.candidate(allocator.draw(costs, PORTABLE, dict.fromkeys(layers, 3)))
    assert {m.top_k for m in portable.layers} == {3}


def test_every_layer_takes_its_cheapest_ranking() -> None:
    allocator = with_limit("itself", 0.1)
    space, model = allocator.space, allocator.model
    for seed in range(4):
        costs = drawn(model.costs, seed)
        params = allocator.draw(costs, RAGGED)
        for layer in space.inventory.moe_layers:
            kept, _ = space.layer_choice(params, layer)
            cost = {c: costs[model.index[f"blk.{layer}.experts", (kept, c)]] for c in space.criteria}
            assert cost[params[f"blk.{layer}.criterion"]] == min(cost.values())


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Classes of random sizes and costs, some shorter than others, a place in each, and a room they fit."""
    rng = np.random.default_rng(draw(SEEDS))
    count, options = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    sizes = np.sort(rng.integers(0, 10_000, (count, options)), 1)
    costs = rng.normal(0, 1, (count, options))
    there = rng.integers(1, options + 1, count)
    missing = np.arange(options)[None] >= there[:, None]
    costs[missing], sizes[missing] = np.inf, 0
    where = rng.integers(0, there)
    used = int(sizes[np.arange(count), where].sum())
    return sizes, costs, where, used + draw(st.integers(0, 20_000))


@settings(deadline=None, max_examples=150)
@given(problems())
def test_improving_never_exceeds_the_room_and_never_worsens(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    sizes, costs, where, room = problem
    rows, start = np.arange(len(where)), where.copy()
    found = improve(sizes, costs, where, room)
    assert (where == start).all()  # the start is left as it was
    assert int(sizes[rows, found].sum()) <= room
    assert float(costs[rows, found].sum()) <= float(costs[rows, start].sum()) + 1e-12


def test_improving_spends_what_is_left_on_the_largest_gain_that_fits() -> None:
    sizes, costs = np.array([[10, 20], [10, 30], [10, 90]]), np.array([[5.0, 4.0], [5.0, 2.0], [5.0, 0.0]])
    assert improve(sizes, costs, np.zeros(3, int), 50).tolist() == [0, 1, 0]
    assert improve(sizes, costs, np.zeros(3, int), 60).tolist() == [1, 1, 0]
    assert improve(sizes, costs, np.zeros(3, int), 29).tolist() == [0, 0, 0]


def test_improving_exchanges_an_upgrade_for_a_downgrade() -> None:
    sizes, costs = np.array([[10, 30], [10, 30]]), np.array([[1.0, 0.9], [5.0, 0.0]])
    assert improve(sizes, costs, np.array([1, 0]), 40).tolist() == [0, 1]
