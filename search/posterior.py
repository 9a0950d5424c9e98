"""A Bayesian model of damage over decisions, learned from finished trials.

The sum S of option costs orders configs well, but damage is more than additive
where it is large: K = exp(a) S^b, with a and b fitted to the study's own trials.
Through that curve every trial says what its options' costs sum to. Prior: every
cost is its measured one, give or take; two kinds of interaction, of weights learned
like costs, are added where additivity is known to fail: pruning with low bits in
one layer, and damage of neighbouring layers (the geometric mean of the two, which
is what the cross term of a quadratic form is). Samples come by Matheron's rule:
draw from the prior, then correct by what the data says of the difference, which
needs one solve of a (trials, trials) system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RELATIVE_DOUBT = 0.3  # of a measured cost, one standard deviation
_FLOOR_DOUBT = 1e-3  # of the median sum: for options that measured as nothing
_COMMON_DOUBT = 0.2  # of the sum's scale
_CURVE = np.array([0.0, 1.15])  # log K over log S before any trial; measured on the reference model
_CURVE_DOUBT = np.array([0.5, 0.15])
_CURVE_NOISE = 0.15  # of log K about the curve


@dataclass(frozen=True)
class Curve:
    """K = exp(a) S^b, both in nats per token."""

    a: float = 0.0
    b: float = 1.0

    @classmethod
    def fit(cls, sums: np.ndarray, damage: np.ndarray) -> Curve:
        """Ridge regression of log K on log S towards the prior curve."""
        keep = (sums > 0) & (damage > 0)
        x = np.stack([np.ones(keep.sum()), np.log(sums[keep])], 1)
        y = np.log(damage[keep])
        precision = np.diag(_CURVE_DOUBT**-2.0)
        left = x.T @ x / _CURVE_NOISE**2 + precision
        right = x.T @ y / _CURVE_NOISE**2 + precision @ _CURVE
        a, b = np.linalg.solve(left, right)
        return cls(float(a), float(max(b, 0.3)))

    def damage(self, sums: np.ndarray | float) -> np.ndarray:
        """K of S."""
        return np.asarray(np.exp(self.a) * np.maximum(sums, 1e-12) ** self.b)

    def sums(self, damage: np.ndarray | float) -> np.ndarray:
        """S of K."""
        return np.asarray((np.maximum(damage, 1e-12) / np.exp(self.a)) ** (1 / self.b))

    def slope(self, sums: float) -> float:
        """dK/dS."""
        return float(self.b * self.damage(sums) / max(sums, 1e-12))


class Posterior:
    """Costs given trials.

    Args:
        costs: (options,) prior means, nats.
        columns: Options each trial adds up.
        observed: (trials,) sum of costs each trial showed, nats.
        noise: (trials,) standard deviation of each.
        features: (trials, F) interactions, each to be weighted; None for none.
        doubt: (F,) standard deviation of those weights about zero.
    """

    def __init__(
        self,
        costs: np.ndarray,
        columns: Sequence[Sequence[int] | np.ndarray],
        observed: np.ndarray,
        noise: np.ndarray,
        features: np.ndarray | None = None,
        doubt: np.ndarray | None = None,
    ) -> None:
        self.costs, count = costs, len(columns)
        design = np.zeros((count, len(costs)))
        for row, cols in enumerate(columns):
            np.add.at(design[row], list(cols), 1.0)
        self._sums = design @ costs
        scale = float(np.median(self._sums)) if count else float(costs.max(initial=0.0))
        more = np.zeros((count, 0)) if features is None else features
        spread = np.zeros(0) if doubt is None else doubt
        self.deviation = np.concatenate([_RELATIVE_DOUBT * np.abs(costs) + _FLOOR_DOUBT * scale, spread])
        self.means = np.concatenate([costs, np.zeros(len(spread))])
        self.design = np.concatenate([design, more], 1)
        self.observed, self.noise = observed, noise + 1e-9
        if count:
            scaled = self.design * self.deviation
            kernel = scaled @ scaled.T + _COMMON_DOUBT**2 * np.outer(self._sums, self._sums)
            self._inverse = np.linalg.inv(kernel + np.diag(self.noise**2))

    def _corrected(self, values: np.ndarray, factor: float, residual: np.ndarray) -> np.ndarray:
        n = len(self.costs)
        if len(self.observed):
            weights = self._inverse @ residual
            values = values + self.deviation**2 * (self.design.T @ weights)
            factor = factor + _COMMON_DOUBT**2 * float(self._sums @ weights)
        out = values.copy()
        out[:n] += factor * self.costs
        return out

    def mean(self) -> np.ndarray:
        """(options + F,) expected costs, then weights of the interactions."""
        return self._corrected(self.means, 0.0, self.observed - self._sums)

    def sample(self, rng: np.random.Generator, temperature: float = 1.0) -> np.ndarray:
        """As `mean`, drawn from the posterior; `temperature` scales the prior's spread."""
        values = self.means + temperature * self.deviation * rng.standard_normal(len(self.means))
        factor = temperature * _COMMON_DOUBT * rng.standard_normal()
        draw = self.design @ values + factor * self._sums
        draw += temperature * self.noise * rng.standard_normal(len(self.observed))
        return self._corrected(values, factor, self.observed - draw)
