"""Any Optuna sampler on a space with a byte budget: what it proposes is moved to what fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.allocator import Allocator
from spaces.allocation import InfeasibleError
from spaces.space import PORTABLE


def _fit(allocator: Allocator, costs: np.ndarray, form: str, top_k: dict[int, int] | None) -> dict[str, Any]:
    """The best of a form, or of the other one at a budget that only the other one meets."""
    try:
        return allocator.best(costs, form, top_k)
    except InfeasibleError:
        other = next((f for f in allocator.space.forms if f != form), PORTABLE)
        return allocator.best(costs, other, top_k)


class FeasibleSampler(BaseSampler):
    """Any Optuna sampler, its proposals moved to the nearest config that fits the budget.

    Nearest means the fewest steps on the ladders of types and expert counts,
    squared and summed; the move is an exact knapsack too.

    Every trial has a stream of random numbers of its own, so that neither a new start nor another driver
    draws what was drawn before.

    Args:
        make: Makes the sampler with a seed.
        allocator: Of the space.
        seed: Of the study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], allocator: Allocator, seed: int) -> None:
        self.make, self.allocator, self.seed = make, allocator, seed
        self.inner = make(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.allocator.space.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        own = self.inner.infer_relative_search_space(study, trial)
        params = dict(self.inner.sample_relative(study, trial, own))
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = self.inner.sample_independent(study, trial, name, distribution)
        return self.repair(params)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner = self.make(int(np.random.SeedSequence((self.seed, trial.number)).generate_state(1)[0]))
        self.inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()

    def repair(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` if they fit, else the nearest ones that do."""
        space, allocator = self.allocator.space, self.allocator
        plan = allocator.carry.plan(space.candidate(params).plan)
        form = str(params["form"])
        if allocator.carry.target.file_bytes(plan) <= allocator.limit:
            return dict(params)
        costs = np.zeros(len(allocator.model.costs))
        for tensor in space.inventory.quantizable:
            steps = space.ladder(tensor)
            wanted = steps.index(params[tensor.name])
            for i, type_name in enumerate(steps):
                costs[allocator.model.index[tensor.name, type_name]] = (i - wanted) ** 2
        top_k = {}
        for layer in space.inventory.moe_layers:
            kept, top_k[layer] = space.layer_choice(params, layer)
            criterion, wanted = params[f"blk.{layer}.criterion"], space.kept_options.index(kept)
            for i, n in enumerate(space.kept_options):
                for c in space.criteria:
                    column = allocator.model.index[f"blk.{layer}.experts", (n, c)]
                    costs[column] = (i - wanted) ** 2 + (0.0 if c == criterion else 0.5)
        return _fit(allocator, costs, form, top_k)
