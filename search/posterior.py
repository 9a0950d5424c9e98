"""A Bayesian linear model of damage: KL = sum of option costs, learned from finished trials.

Prior: every option's cost is its measured one give or take; a common factor
lets the sum as a whole be wrong (additivity fails at low bits). Data: the KL of
each finished trial, with noise that grows with it. Samples come by Matheron's
rule: draw costs from the prior, then correct them by what the data says of the
difference, which needs one solve of a (trials, trials) system per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RELATIVE_DOUBT = 0.25  # of a measured cost, one standard deviation
_ABSOLUTE_DOUBT = 2e-5  # nats, for options that measured as nothing
_COMMON_DOUBT = 0.2  # of the sum's scale
_MODEL_NOISE = 0.03  # of a trial's KL: what no linear model explains


class Posterior:
    """Costs given trials.

    Args:
        costs: (options,) prior means, nats.
        columns: Options each trial adds up.
        observed: (trials,) KL of each trial, nats.
        noise: (trials,) standard error of each.
    """

    def __init__(
        self, costs: np.ndarray, columns: Sequence[Sequence[int]], observed: np.ndarray, noise: np.ndarray
    ) -> None:
        self.costs = costs
        self.deviation = _RELATIVE_DOUBT * costs + _ABSOLUTE_DOUBT
        self.design = np.zeros((len(columns), len(costs)))
        for row, cols in enumerate(columns):
            self.design[row, list(cols)] += 1.0
        self.observed = observed
        self.noise = np.sqrt(noise**2 + (_MODEL_NOISE * observed) ** 2) + 1e-9
        self._sums = self.design @ costs
        if len(columns):
            spread = self.design * self.deviation
            kernel = spread @ spread.T + _COMMON_DOUBT**2 * np.outer(self._sums, self._sums)
            self._factor = np.linalg.cholesky(kernel + np.diag(self.noise**2))

    def _corrected(self, costs: np.ndarray, factor: float, residual: np.ndarray) -> np.ndarray:
        if not len(self.observed):
            return costs * (1 + factor)
        weights = np.linalg.solve(self._factor.T, np.linalg.solve(self._factor, residual))
        updated = costs + self.deviation**2 * (self.design.T @ weights)
        factor = factor + _COMMON_DOUBT**2 * float(self._sums @ weights)
        return np.asarray(updated + factor * self.costs)

    def mean(self) -> np.ndarray:
        """(options,) expected costs."""
        return self._corrected(self.costs, 0.0, self.observed - self._sums)

    def sample(self, rng: np.random.Generator, temperature: float = 1.0) -> np.ndarray:
        """(options,) costs drawn from the posterior; `temperature` scales the prior's spread."""
        costs = self.costs + temperature * self.deviation * rng.standard_normal(len(self.costs))
        factor = temperature * _COMMON_DOUBT * rng.standard_normal()
        draw = self.design @ costs + factor * self._sums
        draw += self.noise * rng.standard_normal(len(self.observed))
        return self._corrected(costs, factor, self.observed - draw)
