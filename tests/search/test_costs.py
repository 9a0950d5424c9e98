"""The cost model keeps what was measured, fills the gaps sensibly, and adds up."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.costs import (
    FULL,
    LEAN,
    STREAMED,
    CostModel,
    Effort,
    Option,
    count_probes,
    ranking_probes,
    routing_estimates,
    type_probes,
)
from spaces.quant_types import ladder
from spaces.space import Space
from tests.search import synthetic
from tests.spaces import tiny

SPACE = tiny.space()
MODEL = synthetic.cost_model(SPACE)
SEEDS = st.integers(0, 2**32)


EFFORTS = pytest.mark.parametrize("effort", [FULL, LEAN, STREAMED], ids=["full", "lean", "streamed"])
GRADIENTS = Effort(512, 1, (), (), 0, 512, 1, (0.5, 0.25), False)
"""Of types and top-k there are gradients only."""


def probes(space: Space, effort: Effort = STREAMED) -> list[Option]:
    return list(synthetic.measured(space, effort=effort))


@EFFORTS
def test_no_option_is_probed_twice_nor_two_that_keep_the_same_experts(effort: Effort) -> None:
    for space in (SPACE, tiny.space(**tiny.GROUPED), tiny.space(n_routed_experts=64)):
        probed = [*ranking_probes(space, effort), *type_probes(space, effort)]
        probed += count_probes(space, effort, dict.fromkeys(probed, 0.1))
        asked = [option for option, _ in probed]
        assert len(set(asked)) == len(asked)
        for layer in space.inventory.moe_layers:
            kept = [space.experts(layer, *choice) for name, choice in asked if name == f"blk.{layer}.experts"]
            assert len(set(kept)) == len(kept)
            assert all(len(experts) < space.inventory.experts for experts in kept)


@EFFORTS
def test_every_decision_is_probed_with_options_it_has(effort: Effort) -> None:
    space, asked = SPACE, probes(SPACE, effort)
    for tensor in space.inventory.quantizable:
        kinds = [choice for name, choice in asked if name == tensor.name]
        assert bool(kinds) == bool(effort.expert_types if tensor.per_expert else effort.other_types)
        assert set(kinds) <= set(ladder(tensor.row))
    for layer in space.inventory.moe_layers:
        decisions = {name for name, _ in asked if name.startswith(f"blk.{layer}.")}
        top_k = {f"blk.{layer}.top_k"} if effort.top_k else set()
        assert decisions - {t.name for t in space.inventory.quantizable} == {f"blk.{layer}.experts", *top_k}


def test_less_effort_measures_less() -> None:
    counts = [len(probes(SPACE, effort)) for effort in (LEAN, FULL, STREAMED)]
    assert counts == sorted(set(counts))


def test_every_ranking_is_measured_at_one_count_and_the_best_of_them_at_the_others() -> None:
    space = tiny.space(n_routed_experts=16)
    cost = {"reap": 0.3, "mass": 0.1, "paper": 0.2}
    asked = synthetic.probed(space, lambda o: cost[o[1][1]] if o[0].endswith(".experts") else 0.1)
    for layer in space.inventory.moe_layers:
        at = {choice for name, choice in asked if name == f"blk.{layer}.experts"}
        assert {c for n, c in at if n == 8} == set(space.criteria)
        assert {c for n, c in at if n != 8} == {"mass"}
        assert len({n for n, _ in at}) > 3


def test_an_effort_tries_the_last_rankings_at_the_counts_it_names() -> None:
    space = tiny.space(n_routed_experts=16)
    for rankings, fractions in ((1, (0.75,)), (2, (0.25, 0.5)), (None, (0.5, 0.25))):
        effort = Effort(512, 1, (), (), 0, 512, rankings, fractions, False)
        for layer in space.inventory.moe_layers:
            at = {choice for name, choice in probes(space, effort) if name == f"blk.{layer}.experts"}
            first, *others = (int(16 * f) for f in fractions)
            assert {c for n, c in at if n == first} == set(space.criteria[-(rankings or 3) :])
            assert sorted(n for n, _ in at if n != first) == others


def test_measured_costs_are_kept_as_they_are() -> None:
    for option, cost in synthetic.measured(SPACE).items():
        assert MODEL.costs[MODEL.index[option]] == cost


def test_leaving_everything_as_it_is_costs_nothing() -> None:
    inventory = SPACE.inventory
    params = SPACE.params({t.name: "BF16" for t in inventory.quantizable}, inventory.experts, "paper")
    assert MODEL.predict(params) == 0.0


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_a_prediction_is_the_sum_over_decisions(seed: int) -> None:
    params = tiny.random_params(SPACE, random.Random(seed))
    candidate = SPACE.candidate(params)
    total = sum(MODEL.costs[MODEL.index[option]] for option in candidate.types)
    for m in candidate.layers:
        choice = (len(m.experts), params[f"blk.{m.layer}.criterion"])
        total += MODEL.costs[MODEL.index[f"blk.{m.layer}.experts", choice]]
        total += MODEL.costs[MODEL.index[f"blk.{m.layer}.top_k", m.top_k]]
    assert MODEL.predict(params) == pytest.approx(total)
    assert len(set(MODEL.columns(params))) == len(SPACE.inventory.quantizable) + 2 * len(candidate.layers)


def random_measurements(space: Space, seed: int) -> tuple[CostModel, dict[tuple[str, str], float]]:
    rng = np.random.default_rng(seed)
    measured = synthetic.probed(space, lambda option: float(rng.lognormal(-4, 2)))
    errors = {k: v and float(rng.lognormal(-3, 2)) for k, v in synthetic.errors(space).items()}
    return CostModel(space, measured, errors), errors


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_costs_that_were_not_measured_rise_with_the_error(seed: int) -> None:
    model, errors = random_measurements(SPACE, seed)
    probed = set(probes(SPACE))
    for tensor in SPACE.inventory.quantizable:
        filled = sorted(
            (errors[tensor.name, kind], model.costs[model.index[tensor.name, kind]])
            for kind in ladder(tensor.row)
            if (tensor.name, kind) not in probed
        )
        costs = [cost for _, cost in filled]
        assert costs == sorted(costs)
        assert costs[0] == 0.0  # BF16, without error
        assert all(cost > 0 for cost in costs[1:])


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_a_count_that_was_not_measured_costs_between_its_neighbours(seed: int) -> None:
    space = tiny.space(n_routed_experts=16)
    model, _ = random_measurements(space, seed)
    counts = space.kept_options
    for layer in space.inventory.moe_layers:
        decision = f"blk.{layer}.experts"
        asked = {choice[0] for name, choice in probes(space) if name == decision}
        assert set(counts) - asked - {16}
        for criterion in space.criteria:
            cost = {n: model.costs[model.index[decision, (n, criterion)]] for n in counts}
            assert cost[16] == 0.0
            for before, n, after in zip(counts, counts[1:], counts[2:], strict=False):
                if n not in asked:
                    least, most = sorted((cost[before], cost[after]))
                    assert least * (1 - 1e-9) <= cost[n] <= most * (1 + 1e-9)


def test_a_ranking_measured_at_one_count_has_the_shape_of_the_one_measured_at_most() -> None:
    space = tiny.space(n_routed_experts=16)
    model, index = synthetic.cost_model(space), synthetic.cost_model(space).index
    for layer in space.inventory.moe_layers:
        ratios = [
            model.costs[index[f"blk.{layer}.experts", (n, "paper")]]
            / model.costs[index[f"blk.{layer}.experts", (n, "reap")]]
            for n in space.kept_options[:-1]
        ]
        assert ratios == pytest.approx([2.0] * len(ratios))


def test_a_count_that_was_not_measured_is_interpolated() -> None:
    space = tiny.space(n_routed_experts=16)  # 9 of 16 lies between the measured 8 and 10
    model = synthetic.cost_model(space)
    eight, nine, ten = (model.costs[model.index["blk.2.experts", (n, "reap")]] for n in (8, 9, 10))
    assert nine == pytest.approx((eight + ten) / 2)


def test_top_k_between_and_beyond_measured_ones_follows_a_straight_line_of_its_logarithm() -> None:
    space = tiny.space(n_routed_experts=16, num_experts_per_tok=8)
    measured = synthetic.measured(space) | {("blk.1.top_k", 7): 0.01, ("blk.1.top_k", 4): 0.08}
    model = CostModel(space, measured, synthetic.errors(space))
    cost = [model.costs[model.index["blk.1.top_k", k]] for k in space.top_k_options]
    assert cost == pytest.approx([0.64, 0.32, 0.16, 0.08, 0.04, 0.02, 0.01, 0.0])


def gradients(space: Space) -> dict[Option, float]:
    """Estimates that order types otherwise than the errors do."""
    rng = np.random.default_rng(7)
    types = {
        key: error and error * float(rng.lognormal(0, 1)) for key, error in synthetic.errors(space).items()
    }
    return types | {option: float(rng.lognormal(-5, 1)) for option in routing_estimates(space, LEAN)}


def test_without_measured_types_costs_have_the_shape_of_the_gradients_which_understate_them() -> None:
    measured, estimated = synthetic.measured(SPACE, effort=GRADIENTS), gradients(SPACE)
    model = CostModel(SPACE, measured, synthetic.errors(SPACE), estimated)
    factors = {
        per_expert: {
            round(float(model.costs[model.index[t.name, kind]] / estimated[t.name, kind]), 6)
            for t in SPACE.inventory.quantizable
            for kind in ladder(t.row)[:-1]
            if t.per_expert == per_expert
        }
        for per_expert in (True, False)
    }
    (experts,), (others,) = factors[True], factors[False]
    assert 1 < experts < others
    assert all(model.costs[model.index[t.name, "BF16"]] == 0 for t in SPACE.inventory.quantizable)


def test_top_k_costs_what_the_gradients_say_where_none_of_its_decision_was_measured() -> None:
    space = tiny.space(n_routed_experts=16, num_experts_per_tok=4)
    estimated, errors = gradients(space), synthetic.errors(space)
    guessed = [option for option in estimated if option[0].endswith(".top_k")]
    assert {k for _, k in guessed} == {2, 3}
    model = CostModel(space, synthetic.measured(space, effort=GRADIENTS), errors, estimated)
    assert all(model.costs[model.index[option]] == estimated[option] for option in guessed)
    measured = synthetic.measured(space, effort=GRADIENTS) | {("blk.1.top_k", 2): 0.5}
    model = CostModel(space, measured, errors, estimated)
    by_hand = CostModel(space, measured, errors)
    for option in guessed:
        known = option[0] == "blk.1.top_k"
        wanted = by_hand.costs[by_hand.index[option]] if known else estimated[option]
        assert model.costs[model.index[option]] == wanted


def test_a_ranking_that_was_not_tried_costs_somewhat_more_than_the_one_that_was() -> None:
    space = tiny.space(n_routed_experts=16)
    measured = synthetic.measured(space, effort=GRADIENTS)
    model = CostModel(space, measured, synthetic.errors(space), gradients(space))
    *untried, tried = space.criteria
    for layer in space.inventory.moe_layers:
        decision = f"blk.{layer}.experts"
        for criterion in untried:
            ratios = [
                model.costs[model.index[decision, (n, criterion)]]
                / model.costs[model.index[decision, (n, tried)]]
                for n in space.kept_options[:-1]
            ]
            assert ratios == pytest.approx(ratios[:1] * len(ratios))
            assert 1 < ratios[0] < 2


def test_measured_types_set_the_scale_and_gradients_the_shape_between_them() -> None:
    estimated = gradients(SPACE)
    true = {key: 3.0 * value for key, value in estimated.items()}  # gradients wrong by a factor
    price = {**true, **{o: c for o, c in synthetic.measured(SPACE).items() if o not in true}}
    measured = synthetic.probed(SPACE, lambda option: price.get(option, 0.1), FULL)
    model = CostModel(SPACE, measured, synthetic.errors(SPACE), estimated)
    by_errors = CostModel(SPACE, measured, synthetic.errors(SPACE))
    for tensor in (t for t in SPACE.inventory.quantizable if t.per_expert):
        kinds = ladder(tensor.row)
        found = [model.costs[model.index[tensor.name, kind]] for kind in kinds]
        assert found == pytest.approx([true[tensor.name, k] for k in kinds], rel=1e-6)
    assert not np.allclose(model.costs, by_errors.costs)


def test_rankings_that_keep_the_same_experts_share_one_measurement() -> None:
    inventory = tiny.inventory()
    order = {layer: tuple(range(8)) for layer in inventory.moe_layers}
    space = Space(inventory, {"reap": order, "mass": order})
    model = CostModel(space, synthetic.measured(space), synthetic.errors(space))
    for n in space.kept_options:
        same = [model.costs[model.index["blk.1.experts", (n, c)]] for c in ("reap", "mass")]
        assert same[0] == same[1]


def test_rows_that_take_no_quantized_type_cost_nothing() -> None:
    model = synthetic.cost_model(tiny.space(qk_nope_head_dim=48))
    assert model.costs[model.index["blk.0.attn_k_b.weight", "BF16"]] == 0.0
