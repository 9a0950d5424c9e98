"""Searches whose true costs are known, so that what they find can be judged without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial

from search.allocator import Allocator
from search.costs import STREAMED, CostModel, Effort, Option, Probe, count_probes, ranking_probes, type_probes
from search.interactions import Interactions
from search.posterior import Curve
from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.inventory import Inventory
from spaces.quant_types import QUANT_TYPES, ladder
from spaces.space import Space


def errors(space: Space) -> dict[tuple[str, str], float]:
    """A quantization error per tensor and type, as a bank would have measured it."""
    return {
        (t.name, kind): 0.0 if kind == "BF16" else 4.0 ** -QUANT_TYPES[kind].bits_per_weight
        for t in space.inventory.quantizable
        for kind in ladder(t.row)
    }


def probed(space: Space, price: Callable[[Option], float], effort: Effort = STREAMED) -> dict[Option, float]:
    """What every option costs that is measured before the first trial, in the order it is measured."""
    found: dict[Probe, float] = {}
    for probe in [*ranking_probes(space, effort), *type_probes(space, effort)]:
        found[probe] = price(probe[0])
    for probe in count_probes(space, effort, found):
        found[probe] = price(probe[0])
    return {option: cost for (option, _), cost in found.items()}


def pricing(space: Space, seed: int = 0) -> Callable[[Option], float]:
    """The cost of an option: what tensors and layers weigh is random."""
    rng = np.random.default_rng(seed)
    weights = {t.name: float(rng.lognormal()) for t in space.inventory.quantizable}
    layers = {layer: float(rng.lognormal()) for layer in space.inventory.moe_layers}
    badness = {"reap": 0.1, "mass": 0.12, "paper": 0.2}
    damage, experts = errors(space), space.inventory.experts

    def price(option: Option) -> float:
        decision, choice = option
        if decision.endswith(".experts"):
            kept, criterion = choice
            return float(
                layers[int(decision.split(".")[1])] * badness[criterion] * (1 - kept / experts) ** 1.5
            )
        if decision.endswith(".top_k"):
            return float(0.05 * (1 - choice / space.inventory.top_k))
        return weights[decision] * damage[decision, choice]

    return price


def measured(space: Space, seed: int = 0, effort: Effort = STREAMED) -> dict[Option, float]:
    """The cost of every option that is measured."""
    return probed(space, pricing(space, seed), effort)


def cost_model(space: Space, seed: int = 0) -> CostModel:
    return CostModel(space, measured(space, seed), errors(space))


def full_size(space: Space, target: Inventory) -> int:
    return target.file_bytes(target.uniform_plan("BF16"))


def allocator(
    space: Space, fraction: float = 0.15, target: Inventory | None = None, seed: int = 0
) -> Allocator:
    """An allocator whose limit is `fraction` of the way from the smallest candidate to the whole model."""
    model, carry = cost_model(space, seed), Carry(space.inventory, target or space.inventory)
    smallest = Allocator(space, model, carry, 0).smallest()
    limit = smallest + int(fraction * (full_size(space, carry.target) - smallest))
    return Allocator(space, model, carry, limit)


def target_bytes(allocator: Allocator, params: dict[str, Any]) -> int:
    """Size of the target's file, by the inventory alone."""
    plan = allocator.carry.plan(allocator.space.candidate(params).plan)
    return allocator.carry.target.file_bytes(plan)


def additive(allocator: Allocator, costs: np.ndarray, candidate: Candidate) -> float:
    """The sum of a candidate's costs."""
    space, index = allocator.space, allocator.model.index
    total = sum(costs[index[option]] for option in candidate.types)
    for m in candidate.layers:
        n = len(m.experts)
        criterion = next(c for c in space.criteria if space.experts(m.layer, n, c) == m.experts)
        total += costs[index[f"blk.{m.layer}.experts", (n, criterion)]]
        total += costs[index[f"blk.{m.layer}.top_k", m.top_k]]
    return float(total)


def wrong_about(costs: np.ndarray, seed: int, spread: float = 0.6) -> np.ndarray:
    """True costs where `costs` were measured."""
    return costs * np.random.default_rng(seed).lognormal(0, spread, len(costs))


class Game:
    """A study whose trials are scored by true costs and told with noise.

    Args:
        sampler: What proposes.
        allocator: Space and limit.
        truth: One true cost per option of the allocator's cost model.
        noise: Relative, of every KL that is told.
        curve: KL of a sum; the sum itself where None.
        weights: True weights of the interactions, which add to the sum.
    """

    def __init__(
        self,
        sampler: BaseSampler,
        allocator: Allocator,
        truth: np.ndarray,
        noise: float = 0.02,
        curve: Curve | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.allocator, self.truth, self.noise, self.curve = allocator, truth, noise, curve
        self.interactions, self.weights = Interactions(allocator.model), weights
        self.rng = np.random.default_rng(0)
        self.study = optuna.create_study(directions=["minimize", "minimize", "maximize"], sampler=sampler)

    def true_kl(self, params: dict[str, Any]) -> float:
        columns = self.allocator.model.columns(params)
        total = float(self.truth[columns].sum())
        if self.weights is not None:
            total += float(self.interactions.features(columns) @ self.weights)
        return total if self.curve is None else float(self.curve.damage(total))

    def play(self, trials: int, batch: int = 4) -> list[FrozenTrial]:
        """Asks and tells in batches; returns all trials."""
        for begun in range(0, trials, batch):
            asked = [
                self.study.ask(self.allocator.space.distributions) for _ in range(min(batch, trials - begun))
            ]
            for trial in asked:
                self.tell(trial)
        return self.study.get_trials(deepcopy=False)

    def tell(self, trial: Trial) -> None:
        kl = self.true_kl(trial.params) * (1 + self.noise * float(self.rng.standard_normal()))
        size = target_bytes(self.allocator, trial.params)
        trial.set_user_attr("scores", {"kl": kl, "kl_se": self.noise * abs(kl)})
        trial.set_user_attr("rungs", {"1024": [kl] * 4})
        trial.set_constraint("bytes over budget", size / self.allocator.limit - 1)
        self.study.tell(trial, [kl, size, 1e12 / size])
