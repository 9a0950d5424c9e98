"""What a study believes of costs: measured ones, slopes at the incumbent, finished trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from search.costs import CostModel
from search.interactions import Interactions
from search.posterior import Curve, Posterior
from search.slope_book import Slopes

_MOST = 256  # trials learned from: the best and the newest
_NOISE = 0.015  # of a trial's sum: what the model does not explain
_SLOPE_WEIGHT = 0.6  # of slopes against costs: where both were measured, the mixture ranked best
_SHRINK = 0.75  # of a slope: the expansion overstates what a step changes
_REACH = 2.0  # steps on the ladder within which a slope is to be trusted


@dataclass(frozen=True)
class Seen:
    """A scored trial as the belief sees it."""

    number: int
    key: str
    columns: np.ndarray
    features: np.ndarray
    damage: float
    noise: float
    complete: bool
    portable: bool


class Belief:
    """Learns from trials; one per state of the study.

    Args:
        model: Prior costs.
        interactions: Of the same space.
        seen: Scored trials.
        at: Columns of the config costs are to hold near.
        sloped: Columns of a config close to it, and the slopes measured there.
    """

    def __init__(
        self,
        model: CostModel,
        interactions: Interactions,
        seen: Sequence[Seen],
        at: np.ndarray | None = None,
        sloped: tuple[np.ndarray, Slopes] | None = None,
    ) -> None:
        self.model, self.interactions, self.at = model, interactions, at
        seen = _chosen(seen)
        sums = np.array([model.costs[s.columns].sum() for s in seen])
        damage = np.array([s.damage for s in seen])
        self.curve = Curve.fit(sums, damage)
        costs = model.costs if sloped is None else self._tilted(*sloped)
        effective = self.curve.sums(damage)
        relative = np.array([s.noise for s in seen]) / np.maximum(damage, 1e-12)
        noise = effective * np.sqrt(_NOISE**2 + relative**2) / self.curve.b
        features = np.stack([s.features for s in seen]) if seen else np.zeros((0, len(interactions.doubt)))
        self.posterior = Posterior(
            costs, [s.columns for s in seen], effective, noise, features, interactions.doubt
        )

    def _tilted(self, columns: np.ndarray, slopes: Slopes) -> np.ndarray:
        """Prior costs with the slopes at a config mixed in."""
        costs = self.model.costs.copy()
        inventory, space = self.model.space.inventory, self.model.space
        here = set(columns.tolist())
        rate = max(self.curve.slope(float(self.model.costs[columns].sum())), 1e-6)
        for tensor in inventory.quantizable:
            ladder = space.ladder(tensor)
            places = [self.model.index[tensor.name, t] for t in ladder]
            position = next(i for i, c in enumerate(places) if c in here)
            base = self.model.costs[places[position]]
            for i, (place, type_name) in enumerate(zip(places, ladder, strict=True)):
                if i == position or (tensor.name, type_name) not in slopes:
                    continue
                first, second = slopes[tensor.name, type_name]
                change, steps = _SHRINK * (first + second) / rate, abs(i - position)
                weight = _SLOPE_WEIGHT * min(1.0, (_REACH / steps) ** 2)
                own = self.model.costs[place] - base
                # A slope so steep that it leaves the range of costs is the expansion's failure, not news.
                change = float(np.clip(change, -3 * abs(base), 4 * abs(own) + 3 * abs(base)))
                costs[place] = base + (1 - weight) * own + weight * change
        return costs

    def predict(self, columns: np.ndarray, features: np.ndarray) -> float:
        """Expected KL of a config, nats."""
        mean = self.posterior.mean()
        n = len(self.model.costs)
        return float(self.curve.damage(mean[:n][columns].sum() + mean[n:] @ features))

    def draw(self, rng: np.random.Generator, temperature: float) -> np.ndarray:
        """(options,) costs for the knapsack, drawn from the posterior and holding near `at`."""
        values = self.posterior.sample(rng, temperature) if temperature else self.posterior.mean()
        n = len(self.model.costs)
        if self.at is None:
            return values[:n]
        return self.interactions.linearised(values[:n], values[n:], self.at)


def _chosen(seen: Sequence[Seen]) -> list[Seen]:
    """At most `_MOST` trials, half of them the best and half the newest: what decides the next ones."""
    if len(seen) <= _MOST:
        return list(seen)
    best = sorted(seen, key=lambda s: (s.damage, s.number))[: _MOST // 2]
    taken = {s.number for s in best}
    newest = [s for s in seen if s.number not in taken][-(_MOST - len(best)) :]
    return sorted([*best, *newest], key=lambda s: s.number)


def observed(trials: Sequence[FrozenTrial]) -> list[tuple[FrozenTrial, float, float]]:
    """(trial, KL, standard error) of every finished or early-stopped trial.

    An early-stopped trial saw only some tokens, which may be harder or
    easier than the rest: its KL is scaled by what complete trials show of that.
    All complete trials saw the same tokens, so that what they differ by is no
    noise of sampling; only what the scaling leaves open is.
    """
    scored = [t for t in trials if "scores" in t.user_attrs]
    complete = [t for t in scored if t.state == TrialState.COMPLETE]
    out = [(t, float(t.user_attrs["scores"]["kl"]), 0.0) for t in complete]
    by_rung: dict[str, tuple[float, float]] = {}
    for t in scored:
        if t.state != TrialState.PRUNED:
            continue
        last = max(t.user_attrs["rungs"], key=int)
        if last not in by_rung:
            by_rung[last] = _scale(complete, last)
        factor, spread = by_rung[last]
        kl = factor * float(t.user_attrs["scores"]["kl"])
        out.append((t, kl, spread * kl))
    return sorted(out, key=lambda row: row[0].number)


def _scale(complete: Sequence[FrozenTrial], rung: str) -> tuple[float, float]:
    """(factor, relative spread) from the mean at a rung to that of all."""
    ratios = [
        t.user_attrs["scores"]["kl"] / max(float(np.mean(t.user_attrs["rungs"][rung])), 1e-12)
        for t in complete[-64:]
        if rung in t.user_attrs["rungs"]
    ]
    if not ratios:
        return 1.0, 0.1
    middle = float(np.median(ratios))
    spread = float(np.median(np.abs(np.array(ratios) / middle - 1))) * 1.5
    return middle, max(0.02, spread)
