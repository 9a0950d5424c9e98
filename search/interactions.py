"""Where damage does not add up: pruning with low bits in a layer, and neighbouring layers.

If damage were a quadratic form of what options change, the cross term of two
groups of damages p and e would be 2 rho sqrt(p e). So each interaction is such a
geometric mean, and what is learned is its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from search.costs import CostModel

_SHARED_DOUBT = 0.3  # of a weight that all layers share
_OWN_DOUBT = 0.15  # of what a layer's weight differs by
_STEEPEST = 2.0  # bound of a geometric mean's derivative, which is infinite at no damage


class Interactions:
    """Interactions of one space.

    Args:
        model: Prior costs; groups of them are what interacts.
    """

    def __init__(self, model: CostModel) -> None:
        self.model = model
        inventory = model.space.inventory
        self.moe = list(inventory.moe_layers)
        self.layers = inventory.layers

    @cached_property
    def _place(self) -> np.ndarray:
        """(options, 2) layer of every option (-1 outside) and group: 0 pruning, 1 experts' bits, 2 others."""
        by_name = self.model.space.inventory.by_name
        out = np.full((len(self.model.index), 2), -1)
        for (decision, _), column in self.model.index.items():
            if decision in by_name:
                tensor = by_name[decision]
                layer = -1 if tensor.layer is None else tensor.layer
                out[column] = layer, 1 if tensor.per_expert else 2
            else:
                out[column] = int(decision.split(".")[1]), 0 if decision.endswith(".experts") else 2
        return out

    def groups(self, columns: Sequence[int] | np.ndarray) -> np.ndarray:
        """(layers, 3) prior damage of a config by layer and group."""
        place = self._place[list(columns)]
        inside = place[:, 0] >= 0
        out = np.zeros((self.layers, 3))
        np.add.at(out, (place[inside, 0], place[inside, 1]), self.model.costs[list(columns)][inside])
        return out

    def features(self, columns: Sequence[int] | np.ndarray) -> np.ndarray:
        """(F,) interactions of a config: per MoE layer, their sum, per pair of neighbours, their sum."""
        groups = self.groups(columns)
        pruned = np.sqrt(groups[self.moe, 0] * groups[self.moe, 1])
        whole = groups.sum(1)
        neighbours = np.sqrt(whole[:-1] * whole[1:])
        return np.concatenate([pruned, [pruned.sum()], neighbours, [neighbours.sum()]])

    @cached_property
    def doubt(self) -> np.ndarray:
        """(F,) prior standard deviation of every weight."""
        own, pairs = [_OWN_DOUBT] * len(self.moe), [_OWN_DOUBT] * (self.layers - 1)
        return np.array([*own, _SHARED_DOUBT, *pairs, _SHARED_DOUBT])

    def linearised(
        self, costs: np.ndarray, weights: np.ndarray, at: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """(options,) costs that hold near a config, its interactions' derivatives counted in.

        Args:
            costs: (options,) drawn or expected costs.
            weights: (F,) weights of the interactions.
            at: Columns of the config.
        """
        groups, moe = self.groups(at), len(self.moe)
        within = weights[:moe] + weights[moe]
        between = weights[moe + 1 : -1] + weights[-1]
        rate = np.zeros((self.layers, 3))
        for row, layer in enumerate(self.moe):
            p, e = groups[layer, 0], groups[layer, 1]
            rate[layer, 0] += within[row] * _derivative(p, e)
            rate[layer, 1] += within[row] * _derivative(e, p)
        whole = groups.sum(1)
        for i, weight in enumerate(between):
            rate[i] += weight * _derivative(whole[i], whole[i + 1])
            rate[i + 1] += weight * _derivative(whole[i + 1], whole[i])
        place = self._place
        factor = np.ones(len(costs))
        inside = place[:, 0] >= 0
        factor[inside] += rate[place[inside, 0], place[inside, 1]]
        return costs * np.maximum(factor, 0.1)


def _derivative(x: float, other: float) -> float:
    """Of sqrt(x * other) by x, bounded."""
    return min(_STEEPEST, 0.5 * float(np.sqrt(other / x))) if x > 0 else _STEEPEST * (other > 0)
