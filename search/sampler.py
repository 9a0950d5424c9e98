"""The budget-exact sampler: Thompson sampling over exact budgets.

Every ask draws option costs from what the study believes (`search.belief`) and
returns the best config for that draw, so every trial fits and would be the best
one if the draw were true. Three arms take turns: near the incumbent (few changes,
each paid for by others: swaps that the belief expects to gain), anywhere, and the
front (smaller budgets and fewer active experts, for the other objectives).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.allocator import Allocator
from search.belief import Belief, Seen, observed
from search.feasible import FeasibleSampler
from search.interactions import Interactions
from search.sampler_names import SAMPLERS
from search.slope_book import SlopeBook
from spaces.allocation import InfeasibleError
from spaces.errors import unknown
from spaces.space import PORTABLE, RAGGED

_RESAMPLES = 8
_SCORED = (TrialState.COMPLETE, TrialState.PRUNED)
ARMS = (0.55, 0.30, 0.15)  # shares of near the incumbent, anywhere and the front
_CALM = 0.5  # temperature near the incumbent, and of half of the draws elsewhere
_PENALTIES = (2e-5, 3e-2)  # of the incumbent's damage, per change: least and most
_HALVINGS = 4
_MOST_CHANGES = 32
_SMALLEST_SHARE = 0.5  # of the limit, on the front


class KnapsackSampler(BaseSampler):
    """Bayesian knapsack with Thompson sampling.

    Args:
        allocator: Solves the budget for given costs.
        seed: Of the draws; with the trial's number it decides each of them.
        slopes: Slopes measured at incumbents.
        arms: Shares of the arms; they sum up to 1.
    """

    def __init__(
        self,
        allocator: Allocator,
        seed: int = 0,
        slopes: SlopeBook | None = None,
        arms: tuple[float, float, float] = ARMS,
    ) -> None:
        self.arms = arms
        self.allocator, self.seed = allocator, seed
        self.space = allocator.space
        self.slopes = slopes or SlopeBook()
        self.interactions = Interactions(allocator.model)
        self._seen: dict[int, tuple[str, np.ndarray, np.ndarray, bool]] = {}
        self._said: tuple[int, list[Seen]] = 0, []
        self._beliefs: dict[tuple[Any, ...], Belief] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.space.distributions)

    def seen(self, trials: Sequence[FrozenTrial]) -> list[Seen]:
        """What the scored trials say."""
        # Finished trials only ever become more, and a round asks many times between two of them.
        done = [t for t in trials if t.state in _SCORED]
        if len(done) != self._said[0]:
            self._said = len(done), self._read(done)
        return self._said[1]

    def _read(self, done: Sequence[FrozenTrial]) -> list[Seen]:
        whole = self.space.distributions.keys()
        out = []
        for trial, damage, noise in observed(done):
            if trial.number not in self._seen:
                if set(trial.params) < whole:
                    continue
                columns = np.array(self.allocator.model.columns(trial.params))
                candidate = self.space.candidate(trial.params)
                features = self.interactions.features(columns)
                self._seen[trial.number] = candidate.key, columns, features, candidate.portable
            key, columns, features, portable = self._seen[trial.number]
            complete = trial.state == TrialState.COMPLETE
            out.append(Seen(trial.number, key, columns, features, damage, noise, complete, portable))
        return out

    def incumbent(self, seen: Sequence[Seen], form: str) -> Seen | None:
        """The lowest KL of a form among complete trials."""
        return min(self._complete(seen, form), key=lambda s: (s.damage, s.number), default=None)

    def last_sloped(self, seen: Sequence[Seen], form: str) -> float:
        """KL of the best config of a form that slopes were measured at; infinite where there is none."""
        return min((s.damage for s in self._measured(seen, form)), default=float("inf"))

    def _measured(self, seen: Sequence[Seen], form: str) -> list[Seen]:
        """Complete trials of a form that slopes were measured at."""
        keys = self.slopes.keys()
        return [s for s in self._complete(seen, form) if s.key in keys and self.slopes.get(s.key) is not None]

    def _complete(self, seen: Sequence[Seen], form: str) -> list[Seen]:
        one = len(self.space.forms) == 1
        return [s for s in seen if s.complete and (one or s.portable == (form == PORTABLE))]

    def _sloped(self, seen: Sequence[Seen], near: Seen) -> Seen | None:
        """The best config of a trial's form that slopes were measured at.

        It need not be the trial itself: that is few changes away, where most of what slopes say holds.
        """
        known = self._measured(seen, PORTABLE if near.portable else RAGGED)
        return min(known, key=lambda s: (s.damage, s.number), default=None)

    def belief(self, seen: Sequence[Seen], near: Seen | None) -> Belief:
        """What the study believes, holding near a trial."""
        sloped = None if near is None else self._sloped(seen, near)
        name = len(seen), None if near is None else near.number, None if sloped is None else sloped.number
        if name not in self._beliefs:
            if len(self._beliefs) > 4:
                self._beliefs.clear()
            at = None if near is None else near.columns
            slopes = None if sloped is None else self.slopes.get(sloped.key)
            there = None if sloped is None or slopes is None else (sloped.columns, slopes)
            self._beliefs[name] = Belief(self.allocator.model, self.interactions, seen, at, there)
        return self._beliefs[name]

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        seen = self.seen(trials)
        asked = [t for t in trials if t.state == TrialState.RUNNING and set(t.params) >= set(search_space)]
        tried = {s.key for s in seen} | {self.space.candidate(t.params).key for t in asked}
        rng = np.random.default_rng((self.seed, trial.number))
        form = self.space.forms[int(rng.integers(len(self.space.forms)))]
        near = self.incumbent(seen, form)
        belief = self.belief(seen, near)
        arm = float(rng.random())
        params: dict[str, Any] = {}
        for attempt in range(_RESAMPLES):
            # Repeats mean the belief is sure of itself: widen it until something new comes up.
            params = self._propose(belief, near, form, arm, 1 + 0.5 * attempt, rng)
            if self.space.candidate(params).key not in tried:
                break
        return params

    def _propose(
        self, belief: Belief, near: Seen | None, form: str, arm: float, wider: float, rng: np.random.Generator
    ) -> dict[str, Any]:
        """One draw of the arm that `arm` (in 0..1) falls on."""
        if arm < self.arms[0] and near is not None:
            return self._near(belief, near, form, rng, _CALM * wider)
        costs = belief.draw(rng, wider * (_CALM if rng.random() < 0.5 else 1.0))
        if arm < 1 - self.arms[2] or near is None:
            return self._fit(costs, form, self._cheapest_top_k(costs, form))
        share = float(rng.uniform(_SMALLEST_SHARE, 1.0))
        return self._fit(costs, form, self._top_k(rng), share)

    def _near(
        self, belief: Belief, near: Seen, form: str, rng: np.random.Generator, temperature: float
    ) -> dict[str, Any]:
        """The best config for a draw that differs from a trial's in few decisions."""
        costs = belief.draw(rng, temperature)
        wanted = int(np.exp(rng.uniform(np.log(2), np.log(_MOST_CHANGES + 1))))
        total = float(np.abs(costs[near.columns]).sum())
        here = np.zeros(len(costs), bool)
        here[near.columns] = True
        top_k = self._same_top_k(near)
        top_k = top_k or self._cheapest_top_k(costs, form)
        params: dict[str, Any] = {}
        # The penalty per change that leaves about as many changes as wanted.
        low, high = _PENALTIES
        for _ in range(_HALVINGS):
            penalty = (low * high) ** 0.5
            params = self._fit(np.where(here, costs, costs + penalty * total), form, top_k)
            changed = len(set(self.allocator.model.columns(params)) - set(near.columns.tolist()))
            if changed == 0 or changed < wanted:
                high = penalty
            elif changed > 1.5 * wanted:
                low = penalty
            else:
                break
        return params

    def _same_top_k(self, near: Seen) -> dict[int, int] | None:
        """Active experts per layer of a trial; None where they are the model's own."""
        here, index, options = (
            set(near.columns.tolist()),
            self.allocator.model.index,
            self.space.top_k_options,
        )
        chosen = {
            layer: next(k for k in options if index[f"blk.{layer}.top_k", k] in here)
            for layer in self.space.inventory.moe_layers
        }
        return None if set(chosen.values()) == {self.space.inventory.top_k} else chosen

    def _fit(
        self, costs: np.ndarray, form: str, top_k: dict[int, int] | None = None, share: float = 1.0
    ) -> dict[str, Any]:
        """The best of a form; where that does not fit, with the whole limit, then of the other form."""
        other = next((f for f in self.space.forms if f != form), form)
        for wanted, part in ((form, share), (form, 1.0), (other, 1.0)):
            try:
                return self.allocator.draw(costs, wanted, top_k, part)
            except InfeasibleError:
                continue
        return self.allocator.best(costs, PORTABLE, top_k)

    def _cheapest_top_k(self, costs: np.ndarray, form: str) -> dict[int, int]:
        """Active experts per layer that a draw of costs finds best; mostly the model's own."""
        index, layers = self.allocator.model.index, self.space.inventory.moe_layers
        table = np.array(
            [[costs[index[f"blk.{layer}.top_k", k]] for k in self.space.top_k_options] for layer in layers]
        )
        rows = np.broadcast_to(table.sum(0), table.shape) if form == PORTABLE else table
        return {
            layer: self.space.top_k_options[int(row.argmin())]
            for layer, row in zip(layers, rows, strict=True)
        }

    def _top_k(self, rng: np.random.Generator) -> dict[int, int] | None:
        """Fewer active experts, in all layers or in some; half of the time the model's own."""
        most = self.space.inventory.top_k
        if rng.random() < 0.5 or most == 1:
            return None
        first, alike = int(rng.choice(self.space.top_k_options)), rng.random() < 0.5
        return {
            layer: first if alike else int(rng.choice(self.space.top_k_options))
            for layer in self.space.inventory.moe_layers
        }

    def predict(self, trials: Sequence[FrozenTrial], params: dict[str, Any]) -> float:
        """Expected KL of a set of parameters after the trials so far, nats."""
        columns = np.array(self.allocator.model.columns(params))
        belief = self.belief(self.seen(trials), None)
        return belief.predict(columns, self.interactions.features(columns))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"{param_name!r} is not a parameter of the space this sampler was made for")


def make_sampler(name: str, allocator: Allocator, seed: int, slopes: SlopeBook | None = None) -> BaseSampler:
    """The sampler `--sampler` names.

    Args:
        name: In `SAMPLERS`.
        allocator: Of the space.
        seed: Of its draws.
        slopes: Slopes measured so far.

    Raises:
        UserError: An unknown name.
    """
    if name == "knapsack":
        return KnapsackSampler(allocator, seed, slopes)
    if name not in _OPTUNAS:
        raise unknown("--sampler", name, SAMPLERS)

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _OPTUNAS[name](seed)

    return FeasibleSampler(make, allocator, seed)


_OPTUNAS: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
    "nsgaii": lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
