"""The allocator's answer fits the limit to the byte and is the cheapest of all that do."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from compression.families import open_inventory
from search.allocator import Allocator
from spaces.allocation import InfeasibleError
from spaces.gguf_layout import header, padded
from spaces.plan import Plan
from spaces.quant_types import QUANT_TYPES, ladder
from spaces.space import PORTABLE, RAGGED, Space
from tests.search import synthetic
from tests.spaces import tiny

SEEDS = st.integers(0, 2**32)
FRACTIONS = st.floats(0.001, 1.0)
FORMS = st.sampled_from([PORTABLE, RAGGED])
CASES = ["itself", "deepseek-v3", "grouped"]


@cache
def case(name: str) -> Allocator:
    """Allocators to itself, to a larger model, and for group-limited routing; their limit is set later."""
    if name == "grouped":
        return synthetic.allocator(tiny.space(**tiny.GROUPED))
    target = open_inventory(name) if name == "deepseek-v3" else None
    return synthetic.allocator(tiny.space(), target=target)


def with_limit(name: str, fraction: float) -> Allocator:
    base = case(name)
    smallest = base.smallest()
    room = synthetic.full_size(base.space, base.carry.target) - smallest
    return Allocator(base.space, base.model, base.carry, smallest + 4096 + int(fraction * room))


def drawn(costs: np.ndarray, seed: int) -> np.ndarray:
    """Costs as a posterior draws them: some of them negative."""
    rng = np.random.default_rng(seed)
    return costs * (1 + 0.8 * rng.standard_normal(len(costs))) + 1e-4 * rng.standard_normal(len(costs))


def drawn_top_k(space: Space, seed: int) -> dict[int, int] | None:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return None
    return {layer: rng.choice(space.top_k_options) for layer in space.inventory.moe_layers}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(CASES), FORMS, FRACTIONS, SEEDS)
def test_what_comes_back_is_a_valid_candidate_within_the_limit(
    name: str, form: str, fraction: float, seed: int
) -> None:
    allocator = with_limit(name, fraction)
    space = allocator.space
    params = allocator.best(drawn(allocator.model.costs, seed), form, drawn_top_k(space, seed))
    assert params.keys() == space.distributions.keys()
    candidate = space.candidate(params)
    candidate.validate(space.inventory)
    assert synthetic.target_bytes(allocator, params) <= allocator.limit
    if form == PORTABLE:
        assert candidate.portable


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(CASES), FORMS, FRACTIONS, SEEDS)
def test_no_single_change_that_would_help_still_fits(
    name: str, form: str, fraction: float, seed: int
) -> None:
    allocator = with_limit(name, fraction)
    space, model, costs = allocator.space, allocator.model, drawn(allocator.model.costs, seed)
    params = allocator.best(costs, form)

    for tensor in space.inventory.quantizable:
        paid = costs[model.index[tensor.name, params[tensor.name]]]
        better = [k for k in ladder(tensor.row) if costs[model.index[tensor.name, k]] < paid - 1e-9]
        if better:  # the smallest of them is enough to try
            kind = min(better, key=lambda k: QUANT_TYPES[k].bits_per_weight)
            changed = params | {tensor.name: kind}
            assert synthetic.target_bytes(allocator, changed) > allocator.limit, (tensor.name, kind)
    for layer in space.inventory.moe_layers:
        kept, _ = space.layer_choice(params, layer)
        cost = {c: costs[model.index[f"blk.{layer}.experts", (kept, c)]] for c in space.criteria}
        assert cost[params[f"blk.{layer}.criterion"]] == min(cost.values())


def body(allocator: Allocator, plan: Plan) -> int:
    """Bytes of the target's tensors."""
    return sum(padded(t.size) for t in allocator.carry.target.infos(allocator.carry.plan(plan)))


def least_cost(allocator: Allocator, costs: np.ndarray, form: str) -> float:
    """The least cost within the limit, as an integer program solved by HiGHS."""
    space, model, carry = allocator.space, allocator.model, allocator.carry
    inventory = space.inventory
    layers, counts = inventory.moe_layers, space.kept_options
    types = {t.name: ladder(t.row)[0] for t in inventory.quantizable}
    lowest = dict.fromkeys(layers, counts[0])
    top_k = tuple((layer, inventory.top_k) for layer in layers)

    def size(types: dict[str, str], kept: dict[int, int]) -> int:
        return body(allocator, Plan(tuple(kept.items()), top_k, tuple(types.items())))

    base = size(types, lowest)
    # The header's length hangs on the form alone: arrays where layers may differ.
    ragged = form == RAGGED
    longest = Plan(
        tuple((layer, counts[0] if ragged and i else counts[-1]) for i, layer in enumerate(layers)),
        tuple((layer, 1 if ragged and i else inventory.top_k) for i, layer in enumerate(layers)),
        tuple(types.items()),
    )
    carried = carry.plan(longest)
    head = len(header(carry.target.plan_metadata(carried), carry.target.infos(carried)))
    room = allocator.limit - head - carry.target.tokenizer_bytes - base

    names: dict[object, int] = {}
    prices: list[float] = []
    sizes: list[int] = []

    def variable(name: object, price: float, extra: int) -> int:
        names[name] = len(prices)
        prices.append(price)
        sizes.append(extra)
        return names[name]

    rows: list[tuple[list[int], list[int], int]] = []  # variables, coefficients, right side
    for layer in layers:
        for n in counts:
            # Experts in the lowest types and the router; the types' own extra bytes come below.
            extra = size(types, lowest | {layer: n}) - base
            price = min(costs[model.index[f"blk.{layer}.experts", (n, c)]] for c in space.criteria)
            variable((layer, n), float(price), extra)
        rows.append(([names[layer, n] for n in counts], [1] * len(counts), 1))
        if form == PORTABLE:
            rows += [
                ([names[layer, n], names[layers[0], n]], [1, -1], 0) for n in counts if layer != layers[0]
            ]
    for t in inventory.quantizable:
        for n in counts if t.per_expert else counts[:1]:
            kept = lowest if t.layer not in lowest else lowest | {t.layer: n}
            bare = size(types, kept)
            for kind in ladder(t.row):
                extra = size(types | {t.name: kind}, kept) - bare
                variable((t.name, n, kind), float(costs[model.index[t.name, kind]]), extra)
            group = [names[t.name, n, kind] for kind in ladder(t.row)]
            if t.per_expert:
                rows.append(([*group, names[t.layer, n]], [1] * len(group) + [-1], 0))
            else:
                rows.append((group, [1] * len(group), 1))

    entries = [(i, j, c) for i, (js, cs, _) in enumerate(rows) for j, c in zip(js, cs, strict=True)]
    matrix = coo_array(
        ([c for _, _, c in entries], ([i for i, _, _ in entries], [j for _, j, _ in entries])),
        shape=(len(rows), len(prices)),
    )
    right = np.array([r for _, _, r in rows])
    found = milp(
        np.array(prices),
        integrality=np.ones(len(prices)),
        bounds=Bounds(0, 1),
        # Everything is padded to 32 bytes, so 32 bytes are one unit.
        constraints=[
            LinearConstraint(matrix.tocsr(), right, right),
            LinearConstraint(np.array(sizes)[None] / 32, -np.inf, room // 32),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0, found.message
    active = [model.index[f"blk.{layer}.top_k", inventory.top_k] for layer in layers]
    return float(found.fun) + float(costs[active].sum())


@pytest.mark.parametrize("form", [PORTABLE, RAGGED])
@pytest.mark.parametrize(("fraction", "seed"), [(0.02, 1), (0.15, 2), (0.4, 3)])
def test_the_answer_is_the_one_of_an_integer_program(form: str, fraction: float, seed: int) -> None:
    space = tiny.space(num_hidden_layers=3, n_routed_experts=4)
    allocator = synthetic.allocator(space, fraction)
    costs = drawn(allocator.model.costs, seed)
    params = allocator.best(costs, form)
    cost = float(costs[allocator.model.columns(params)].sum())
    assert cost == pytest.approx(least_cost(allocator, costs, form), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_size_fits_exactly_and_one_byte_less_does_not(name: str) -> None:
    base = case(name)
    space, model, carry = base.space, base.model, base.carry
    lowest = {t.name: min(ladder(t.row), key=lambda k: QUANT_TYPES[k].bits_per_weight)
              for t in space.inventory.quantizable}  # fmt: skip
    params = space.params(lowest, space.kept_options[0], space.criteria[0])
    smallest = base.smallest()
    assert smallest == synthetic.target_bytes(base, params)

    found = Allocator(space, model, carry, smallest).best(model.costs, PORTABLE)
    assert synthetic.target_bytes(base, found) == smallest
    for form in (PORTABLE, RAGGED):
        with pytest.raises(InfeasibleError):
            Allocator(space, model, carry, smallest - 1).best(model.costs, form)
    with pytest.raises(InfeasibleError) as error:
        Allocator(space, model, carry, smallest - 1).best(model.costs, PORTABLE)
    assert error.value.smallest == smallest


def test_with_room_for_the_whole_model_nothing_is_taken_away() -> None:
    allocator = with_limit("itself", 1.0)
    for form in (PORTABLE, RAGGED):
        params = allocator.best(allocator.model.costs, form)
        assert allocator.model.predict(params) == 0.0
        assert {m.experts for m in allocator.space.candidate(params).layers} == {tuple(range(8))}


def test_more_room_never_costs_more() -> None:
    for form in (PORTABLE, RAGGED):
        costs = []
        for fraction in (0.01, 0.05, 0.2, 0.5, 1.0):
            allocator = with_limit("itself", fraction)
            costs.append(allocator.model.predict(allocator.best(allocator.model.costs, form)))
        assert costs == sorted(costs, reverse=True)


def test_layers_that_may_differ_are_never_worse_than_layers_that_may_not() -> None:
    # But for the bytes of two arrays in the header, which a ragged file needs.
    for fraction in (0.02, 0.1, 0.3):
        allocator = with_limit("itself", fraction)
        wider = Allocator(allocator.space, allocator.model, allocator.carry, allocator.limit + 128)
        portable = allocator.model.predict(allocator.best(allocator.model.costs, PORTABLE))
        ragged = allocator.model.predict(wider.best(allocator.model.costs, RAGGED))
        assert ragged <= portable + 1e-12


def test_active_experts_are_as_asked_for() -> None:
    allocator = with_limit("itself", 0.2)
    space, costs = allocator.space, allocator.model.costs
    layers = space.inventory.moe_layers
    asked = dict(zip(layers, (1, 2, 1), strict=True))
    ragged = space.candidate(allocator.best(costs, RAGGED, asked))
    assert {m.layer: m.top_k for m in ragged.layers} == asked
    portable = space.candidate(allocator.best(costs, PORTABLE, dict.fromkeys(layers, 1)))
    assert {m.top_k for m in portable.layers} == {1}
