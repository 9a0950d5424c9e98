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
    bits,
    count_probes,
    ranking_probes,
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
        # Gradients alone tell what types of other tensors cost where little is to be spent.
        assert bool(kinds) == (tensor.per_expert or effort is not LEAN)
        assert set(kinds) <= set(ladder(tensor.row))
    for layer in space.inventory.moe_layers:
        decisions = {name for name, _ in asked if name.startswith(f"blk.{layer}.")}
        assert {f"blk.{layer}.experts", f"blk.{layer}.top_k"} <= decisions


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


def gradients(space: Space) -> dict[tuple[str, str], float]:
    """Estimates that order types otherwise than the errors do."""
    rng = np.random.default_rng(7)
    return {
        key: error and error * float(rng.lognormal(0, 1)) for key, error in synthetic.errors(space).items()
    }


def test_without_measured_types_the_gradients_are_the_costs() -> None:
    measured, estimated = synthetic.measured(SPACE, effort=LEAN), gradients(SPACE)
    model = CostModel(SPACE, measured, synthetic.errors(SPACE), estimated)
    for tensor in SPACE.inventory.quantizable:
        for kind in () if tensor.per_expert else ladder(tensor.row):
            assert model.costs[model.index[tensor.name, kind]] == estimated[tensor.name, kind]


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


@pytest.mark.parametrize("dense", [1, 0])
def test_bits_per_weight_do_not_count_pruned_experts(dense: int) -> None:
    space = tiny.space(first_k_dense_replace=dense)
    types = {t.name: "Q8_0" if t.per_expert else "IQ4_NL" if t.row % 256 else "IQ1_S"
             for t in space.inventory.quantizable}  # fmt: skip
    weights = {"experts": 0.0, "others": 0.0}
    for t in space.inventory.quantizable:
        weights["experts" if t.per_expert else "others"] += (
            8.5 * t.parameters / 2 if t.per_expert else ((4.5 if t.row % 256 else 1.5625) * t.parameters)
        )
    stored = sum(t.parameters / (2 if t.per_expert else 1) for t in space.inventory.quantizable)
    assert bits(space.params(types, 4, "reap"), space) == pytest.approx(sum(weights.values()) / stored)
