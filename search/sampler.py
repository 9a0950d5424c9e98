"""Samplers: the budget-exact one of this project, and any Optuna sampler made feasible.

`KnapsackSampler` draws option costs from the posterior (Thompson sampling) and
returns the exact optimum for that draw, so every trial fits the budget and
would be the best one if the draw were true.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.allocator import Allocator
from search.posterior import Posterior
from search.sampler_names import SAMPLERS
from spaces.allocation import InfeasibleError
from spaces.errors import unknown
from spaces.space import PORTABLE

_RESAMPLES = 12
_NEAR = 0.25  # temperature of the careful half of the asks
_REDUCED_TOP_K = 0.25  # share of asks that explore fewer active experts


def observed(trials: Sequence[FrozenTrial]) -> list[tuple[FrozenTrial, float, float]]:
    """(trial, KL, standard error) of every finished or early-stopped trial.

    An early-stopped trial saw only the first windows, which may be harder or
    easier than the rest: its KL is scaled by what complete trials show of that.
    """
    scored = [t for t in trials if "scores" in t.user_attrs]
    complete = [t for t in scored if t.state == TrialState.COMPLETE]
    stopped = [t for t in scored if t.state == TrialState.PRUNED]
    out = [(t, float(t.user_attrs["scores"]["kl"]), float(t.user_attrs["scores"]["kl_se"])) for t in complete]
    if stopped:
        first = len(stopped[0].user_attrs["windows"]["kl"])
        ratios = [
            t.user_attrs["scores"]["kl"] / max(float(np.mean(t.user_attrs["windows"]["kl"][:first])), 1e-12)
            for t in complete
        ]
        factor = float(np.median(ratios)) if ratios else 1.0
        for t in stopped:
            scores = t.user_attrs["scores"]
            out.append((t, factor * float(scores["kl"]), factor * float(scores["kl_se"])))
    return out


def _fit(allocator: Allocator, costs: np.ndarray, form: str, top_k: dict[int, int] | None) -> dict[str, Any]:
    """The best of a form, or of the other one at a budget that only the other one meets."""
    try:
        return allocator.best(costs, form, top_k)
    except InfeasibleError:
        other = next((f for f in allocator.space.forms if f != form), PORTABLE)
        return allocator.best(costs, other, top_k)


class KnapsackSampler(BaseSampler):
    """Bayesian knapsack with Thompson sampling.

    Args:
        allocator: Solves the budget exactly for given costs.
        seed: Of the draws; with the trial's number it decides each of them.
    """

    def __init__(self, allocator: Allocator, seed: int = 0) -> None:
        self.allocator = allocator
        self.seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.allocator.space.distributions)

    def posterior(self, trials: Sequence[FrozenTrial]) -> Posterior:
        """What the finished trials say of the costs."""
        model = self.allocator.model
        columns, kl, se = [], [], []
        for trial, mean, error in observed(trials):
            if set(trial.params) >= set(self.allocator.space.distributions):
                columns.append(model.columns(trial.params))
                kl.append(mean)
                se.append(error)
        return Posterior(model.costs, columns, np.array(kl), np.array(se))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        posterior = self.posterior(trials)
        space = self.allocator.space
        tried = {space.candidate(t.params).key for t in trials if set(t.params) >= set(search_space)}
        rng = np.random.default_rng((self.seed, trial.number))
        form = space.forms[int(rng.integers(len(space.forms)))]
        # Half of the asks stay near what is known to be good, half roam.
        temperature = _NEAR if rng.random() < 0.5 else 1.0
        params: dict[str, Any] = {}
        for attempt in range(_RESAMPLES):
            # Repeats mean the posterior is sure of itself: widen it until something new comes up.
            costs = posterior.sample(rng, temperature=temperature * (1 + 0.25 * attempt))
            params = _fit(self.allocator, costs, form, self._top_k(rng))
            if space.candidate(params).key not in tried:
                break
        return params

    def _top_k(self, rng: np.random.Generator) -> dict[int, int] | None:
        """The model's top-k mostly; sometimes fewer, for the speed end of the front."""
        space = self.allocator.space
        if rng.random() >= _REDUCED_TOP_K or space.inventory.top_k == 1:
            return None
        first = int(rng.integers(1, space.inventory.top_k))
        alike = rng.random() < 0.5
        return {
            layer: first if alike else int(rng.choice(space.top_k_options))
            for layer in space.inventory.moe_layers
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"{param_name!r} is not a parameter of the space this sampler was made for")


class FeasibleSampler(BaseSampler):
    """Any Optuna sampler, its proposals moved to the nearest config that fits the budget.

    Nearest means the fewest steps on the ladders of types and expert counts,
    squared and summed; the move is an exact knapsack too.
    """

    def __init__(self, inner: BaseSampler, allocator: Allocator) -> None:
        self.inner, self.allocator = inner, allocator

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


def make_sampler(name: str, allocator: Allocator, seed: int) -> BaseSampler:
    """The sampler `--sampler` names.

    Raises:
        UserError: An unknown name.
    """
    if name == "knapsack":
        return KnapsackSampler(allocator, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            inner: BaseSampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
        elif name == "nsgaii":
            inner = optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
        elif name == "gp":
            inner = optuna.samplers.GPSampler(seed=seed)
        elif name == "random":
            inner = optuna.samplers.RandomSampler(seed=seed)
        else:
            raise unknown("--sampler", name, SAMPLERS)
    return FeasibleSampler(inner, allocator)
