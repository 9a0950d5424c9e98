"""The knapsack is exact, honest about its bound, and quick at the size of DeepSeek-V3."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spaces.allocation import InfeasibleError, OptionClass, solve
from spaces.errors import UserError

Options = list[tuple[int, float]]


def as_classes(instance: list[Options]) -> list[OptionClass]:
    return [
        OptionClass(np.array([b for b, _ in c], np.int64), np.array([k for _, k in c], np.float64))
        for c in instance
    ]


def least_cost(instance: list[Options], capacity: int) -> float | None:
    """By trying every choice."""
    costs = [
        sum(k for _, k in choice)
        for choice in itertools.product(*instance)
        if sum(b for b, _ in choice) <= capacity
    ]
    return min(costs, default=None)


def smallest_bytes(instance: list[Options]) -> int:
    return sum(min(b for b, _ in c) for c in instance)


# Few distinct values, so that duplicates and ties are common; quarters add up without rounding.
TIED = st.tuples(st.integers(0, 12), st.integers(-12, 12).map(lambda q: q / 4))
SPREAD = st.tuples(
    st.integers(0, 10**9), st.floats(-10, 10, allow_subnormal=False).map(lambda c: round(c, 6))
)
INSTANCES = st.one_of(
    *(st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5) for option in (TIED, SPREAD))
)


@settings(deadline=None, max_examples=300)
@given(INSTANCES, st.floats(-0.1, 1.1))
@example([[(5, 1.0), (5, 1.0), (5, -1.0)], [(0, 0.0)]], 0.0)
@example([[(3, 2.0), (4, 2.0), (1, 2.0)]] * 3, 0.5)
def test_solution_is_what_trying_every_choice_finds(instance: list[Options], fraction: float) -> None:
    low, high = smallest_bytes(instance), sum(max(b for b, _ in c) for c in instance)
    capacity = int(low + fraction * (high - low))
    expected = least_cost(instance, capacity)
    if expected is None:
        with pytest.raises(InfeasibleError) as error:
            solve(as_classes(instance), capacity)
        assert error.value.smallest == low
        return
    found = solve(as_classes(instance), capacity)
    chosen = [c[i] for c, i in zip(instance, found.choice, strict=True)]
    assert found.bytes == sum(b for b, _ in chosen) <= capacity
    assert found.cost == pytest.approx(sum(k for _, k in chosen), abs=1e-9)
    assert found.cost == pytest.approx(expected, abs=1e-9)
    assert found.optimal
    assert found.bound <= found.cost


@settings(deadline=None, max_examples=50)
@given(INSTANCES)
def test_smallest_bytes_fit_and_one_byte_less_do_not(instance: list[Options]) -> None:
    smallest = smallest_bytes(instance)
    assert solve(as_classes(instance), smallest).bytes == smallest
    with pytest.raises(InfeasibleError) as error:
        solve(as_classes(instance), smallest - 1)
    assert error.value.smallest == smallest
    assert isinstance(error.value, UserError)
    assert f"{smallest:,}" in str(error.value)


@settings(deadline=None, max_examples=50)
@given(INSTANCES)
def test_ample_room_buys_the_cheapest_option_of_every_class(instance: list[Options]) -> None:
    found = solve(as_classes(instance), 10**12)
    assert found.cost == pytest.approx(sum(min(k for _, k in c) for c in instance), abs=1e-9)
    # Of equally good options the smallest is enough.
    best = [min(k for _, k in c) for c in instance]
    assert found.bytes == sum(min(b for b, k in c if k == m) for c, m in zip(instance, best, strict=True))


@settings(deadline=None, max_examples=50)
@given(INSTANCES, st.floats(0, 1))
def test_equal_inputs_give_equal_choices(instance: list[Options], fraction: float) -> None:
    capacity = int(smallest_bytes(instance) + fraction * 20)
    assert solve(as_classes(instance), capacity) == solve(as_classes(instance), capacity)


def test_a_large_fixed_part_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        instance = [
            [(int(b), float(-b + 1e-5 * rng.normal())) for b in rng.integers(0, 12, rng.integers(1, 6))]
            for _ in range(4)
        ]
        capacity = smallest_bytes(instance) + int(rng.integers(0, 30))
        expected = least_cost(instance, capacity)
        fixed = 10**13
        found = solve(as_classes([[(fixed, 0.0)], *instance]), capacity + fixed)
        assert found.cost == pytest.approx(expected, abs=1e-9)


def large_instance(seed: int) -> list[OptionClass]:
    """58 layers of 300 (count, three types) and 300 tensors of 15 types, as a DeepSeek-V3 has."""
    rng = np.random.default_rng(seed)

    def options(count: int, weights: float, weight: float) -> OptionClass:
        bits = np.linspace(1.5, 16, count)
        sizes = (bits / 8 * weights).astype(np.int64) // 32 * 32
        return OptionClass(sizes, weight * 4.0**-bits * rng.uniform(0.97, 1.03, count))

    layers = [options(300, 11e9, rng.lognormal()) for _ in range(58)]
    return [*layers, *(options(15, 10e6, 0.01 * rng.lognormal()) for _ in range(300))]


@pytest.mark.parametrize("bits", [2.0, 3.3])
def test_a_model_of_671_billion_weights_is_solved_within_two_seconds(bits: float) -> None:
    classes = large_instance(0)
    capacity = int(bits / 8 * (58 * 11e9 + 300 * 10e6))
    begun = time.process_time()
    found = solve(classes, capacity)
    assert time.process_time() - begun < 2.0
    assert found.bytes <= capacity
    assert found.bound <= found.cost
    assert found.cost - found.bound <= 1e-3 * found.cost
    # Nothing cheaper fits into what is left over.
    left = capacity - found.bytes
    for c, i in zip(classes, found.choice, strict=True):
        assert c.costs[c.bytes <= c.bytes[i] + left].min() >= c.costs[i]
