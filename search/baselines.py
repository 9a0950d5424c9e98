"""The simple ways a study must beat; they are its first trials."""

from __future__ import annotations

from typing import Any

import numpy as np

from search.allocator import Allocator
from spaces.allocation import InfeasibleError
from spaces.quant_types import LADDER
from spaces.space import RAGGED, Space

PAPER_RATIO = 0.75


def _uniform_types(space: Space, type_name: str) -> dict[str, str]:
    """One type for every tensor; rows it does not take get the nearest their ladder has."""
    return {t.name: space.nearest(t, type_name) for t in space.inventory.quantizable}


def _paper_types(space: Space, base: int) -> dict[str, str]:
    """The paper's precision rule: first and last eighth of the layers one type up, the middle one down."""
    layers = space.inventory.layers
    edge = max(1, layers // 8)
    middle = range(layers // 2 - edge // 2, layers // 2 - edge // 2 + edge)
    out = {}
    for t in space.inventory.quantizable:
        step = base
        if t.layer is not None:
            if t.layer < edge or t.layer >= layers - edge:
                step += 1
            elif t.layer in middle:
                step -= 1
        out[t.name] = space.nearest(t, LADDER[min(max(step, 0), len(LADDER) - 1)])
    return out


def unpruned(allocator: Allocator) -> dict[str, Any] | None:
    """The additive cost model's optimum among configs that keep every expert; None where none fits."""
    space, costs = allocator.space, allocator.model.costs.copy()
    prohibitive = 1e3 + float(np.abs(costs).sum())
    for (decision, choice), column in allocator.model.index.items():
        if decision.endswith(".experts") and choice[0] < space.inventory.experts:
            costs[column] = prohibitive
    params = allocator.best(costs, space.forms[0])
    kept = {space.layer_choice(params, layer)[0] for layer in space.inventory.moe_layers}
    return params if kept == {space.inventory.experts} else None


def baselines(allocator: Allocator) -> dict[str, dict[str, Any]]:
    """Name to parameters of every baseline that fits the budget.

    * `uniform`: nothing pruned, the largest type that fits everywhere.
    * `reap-N+uniform`: N experts by REAP in every layer, the largest uniform type that fits.
    * `paper-rules`: arXiv 2509.25689 with r = 0.75, its importance score, edges up, middle down.
    * `knapsack-unpruned`: the cost model's optimum with every expert kept.
    * `knapsack`, `knapsack-ragged`: the additive cost model's optimum, before any trial.
    """
    space = allocator.space
    experts = space.inventory.experts
    out: dict[str, dict[str, Any]] = {}

    def largest(name: str, kept: int, criterion: str, types_at: Any) -> None:
        for step in range(len(LADDER) - 1, -1, -1):
            params = space.params(types_at(step), kept, criterion)
            plan = allocator.carry.plan(space.candidate(params).plan)
            if allocator.carry.target.file_bytes(plan) <= allocator.limit:
                out[name] = params
                return

    def uniform_at(step: int) -> dict[str, str]:
        return _uniform_types(space, LADDER[step])

    largest("uniform", experts, "reap", uniform_at)
    for kept in space.kept_options[:-1]:
        largest(f"reap-{kept}+uniform", kept, "reap", uniform_at)
    ratio = min(space.kept_options, key=lambda n: abs(n - PAPER_RATIO * experts))
    largest("paper-rules", ratio, "paper", lambda step: _paper_types(space, step))
    whole = unpruned(allocator)
    if whole is not None:
        out["knapsack-unpruned"] = whole
    for form in space.forms:
        try:
            name = "knapsack-ragged" if form == RAGGED else "knapsack"
            out[name] = allocator.best(allocator.model.costs, form)
        except InfeasibleError:
            continue
    return out
