"""The simple configs a study must beat fit its budget and are what their names say."""

from __future__ import annotations

from typing import Any

import pytest

from compression.families import open_inventory
from search.allocator import Allocator
from search.baselines import baselines
from spaces.quant_types import LADDER, quant_type
from spaces.space import RAGGED
from tests.search import synthetic
from tests.spaces import tiny


def types_of(allocator: Allocator, params: dict[str, Any]) -> dict[str, str]:
    """Types of the tensors that take every type."""
    return {t.name: params[t.name] for t in allocator.space.inventory.quantizable if t.row % 256 == 0}


@pytest.fixture(scope="module", params=["itself", "deepseek-v3", "grouped"])
def allocator(request: pytest.FixtureRequest) -> Allocator:
    if request.param == "grouped":
        return synthetic.allocator(tiny.space(**tiny.GROUPED), 0.3)
    target = open_inventory("deepseek-v3") if request.param == "deepseek-v3" else None
    return synthetic.allocator(tiny.space(), 0.3, target)


def test_every_baseline_is_a_valid_candidate_within_the_budget(allocator: Allocator) -> None:
    space = allocator.space
    found = baselines(allocator)
    assert {"uniform", "paper-rules", "knapsack", "knapsack-ragged"} <= found.keys()
    for params in found.values():
        assert params.keys() == space.distributions.keys()
        space.candidate(params).validate(space.inventory)
        assert synthetic.target_bytes(allocator, params) <= allocator.limit


def test_uniform_prunes_nothing_and_takes_the_largest_type_that_fits(allocator: Allocator) -> None:
    params = baselines(allocator)["uniform"]
    (kind,) = set(types_of(allocator, params).values())
    candidate = allocator.space.candidate(params)
    assert {len(m.experts) for m in candidate.layers} == {allocator.space.inventory.experts}
    larger = LADDER[LADDER.index(kind) + 1]
    plan = allocator.carry.plan(allocator.space.inventory.uniform_plan(larger))
    assert allocator.carry.target.file_bytes(plan) > allocator.limit


def test_pruned_baselines_keep_what_reap_ranks_first(allocator: Allocator) -> None:
    space = allocator.space
    pruned = {name: p for name, p in baselines(allocator).items() if name.startswith("reap-")}
    assert len(pruned) == len(space.kept_options) - 1
    for name, params in pruned.items():
        kept = int(name.removeprefix("reap-").removesuffix("+uniform"))
        assert len(set(types_of(allocator, params).values())) == 1
        for m in space.candidate(params).layers:
            assert m.experts == space.experts(m.layer, kept, "reap")


def test_the_papers_rules_keep_three_quarters_with_finer_edges(allocator: Allocator) -> None:
    space = allocator.space
    params = baselines(allocator)["paper-rules"]
    kept = {len(m.experts) for m in space.candidate(params).layers}
    assert kept == {min(space.kept_options, key=lambda n: abs(n - 0.75 * space.inventory.experts))}
    by_layer: dict[int, set[str]] = {}
    for name, kind in types_of(allocator, params).items():
        layer = space.inventory.by_name[name].layer
        if layer is not None:
            by_layer.setdefault(layer, set()).add(kind)
    bits = [quant_type(*kinds).bits_per_weight for _, kinds in sorted(by_layer.items())]
    assert bits[0] == bits[-1] == max(bits) > min(bits)


def test_the_knapsack_predicts_less_damage_than_any_other_baseline(allocator: Allocator) -> None:
    predicted = {name: allocator.model.predict(params) for name, params in baselines(allocator).items()}
    simple = [v for name, v in predicted.items() if not name.startswith("knapsack")]
    assert predicted["knapsack"] <= min(simple)


def test_baselines_that_do_not_fit_are_left_out() -> None:
    allocator = synthetic.allocator(tiny.space())
    tight = Allocator(allocator.space, allocator.model, allocator.carry, allocator.smallest())
    names = baselines(tight).keys()
    assert "uniform" not in names
    assert "knapsack" in names


def test_a_runtime_of_one_count_only_has_portable_baselines() -> None:
    found = baselines(synthetic.allocator(tiny.space("llama.cpp"), 0.3))
    assert "knapsack-ragged" not in found
    assert RAGGED not in {params["form"] for params in found.values()}
