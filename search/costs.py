"""The additive cost model: what each option alone does to KL, and how they add up.

An option's cost is the KL it causes when everything else is left as it is. For
types between measured ones the cost is interpolated in (log error, log KL), the
error being the bank's imatrix-weighted one; the linearity of damage in error is
that of HIGGS (arXiv 2411.17525). Damage of many options together is close to the
sum (the sampler learns how far from it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spaces.quant_types import QUANT_TYPES
from spaces.space import Space

Option = tuple[str, Any]
"""(decision, choice): ("blk.2.experts", (12, "reap")), ("blk.2.top_k", 3) or (tensor name, type)."""

_LEAST = 1e-7  # nats; below what float32 logits resolve

_PROBED_EXPERT_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q4_K")
_PROBED_TYPES = ("IQ1_S", "IQ3_XXS", "Q5_K", "IQ4_NL", "Q8_0")
_PROBED_FRACTIONS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def probes(space: Space) -> list[Option]:
    """The options to measure one at a time; the others are interpolated."""
    out: list[Option] = []
    inventory = space.inventory
    for tensor in inventory.quantizable:
        wanted = _PROBED_EXPERT_TYPES if tensor.per_expert else _PROBED_TYPES
        types = [t for t in space.ladder(tensor) if t in wanted] or list(space.ladder(tensor))
        # Q8_0 is lossless enough to be interpolated where a long ladder has Q5_K.
        out += [(tensor.name, t) for t in types if t != "Q8_0" or tensor.row % 256]
    for layer in inventory.moe_layers:
        seen = set()
        for fraction in _PROBED_FRACTIONS:
            kept = min(space.kept_options, key=lambda n: abs(n - fraction * inventory.experts))
            for criterion in space.criteria:
                experts = space.experts(layer, kept, criterion)
                if kept < inventory.experts and experts not in seen:
                    seen.add(experts)
                    out.append((f"blk.{layer}.experts", (kept, criterion)))
        out += [(f"blk.{layer}.top_k", k) for k in space.top_k_options if k < inventory.top_k]
    return out


def _interpolate(x: float, known_x: np.ndarray, known_y: np.ndarray) -> float:
    """Linear between known points, with slope 1 beyond them; `known_x` ascending."""
    if x < known_x[0]:
        return float(known_y[0] + x - known_x[0])
    if x > known_x[-1]:
        return float(known_y[-1] + x - known_x[-1])
    return float(np.interp(x, known_x, known_y))


class CostModel:
    """Costs of every option as one vector, and which entries a set of parameters adds up."""

    def __init__(
        self,
        space: Space,
        measured: Mapping[Option, float],
        errors: Mapping[tuple[str, str], float],
    ) -> None:
        self.space = space
        self.index: dict[Option, int] = {}
        costs: list[float] = []
        for option, cost in self._complete(measured, errors):
            self.index[option] = len(costs)
            costs.append(cost)
        self.costs = np.array(costs)

    def _complete(
        self, measured: Mapping[Option, float], errors: Mapping[tuple[str, str], float]
    ) -> Iterable[tuple[Option, float]]:
        inventory = self.space.inventory
        for tensor in inventory.quantizable:
            known = sorted(
                (np.log(max(errors[tensor.name, t], 1e-12)), np.log(max(measured[tensor.name, t], _LEAST)))
                for t in self.space.ladder(tensor)
                if (tensor.name, t) in measured
            )
            if not known:  # rows no quantized type takes stay as they are
                for t in self.space.ladder(tensor):
                    yield (tensor.name, t), 0.0
                continue
            xs, ys = np.array([k[0] for k in known]), np.maximum.accumulate([k[1] for k in known])
            for t in self.space.ladder(tensor):
                exact = measured.get((tensor.name, t))
                error = errors[tensor.name, t]
                cost = exact if exact is not None else np.exp(_interpolate(np.log(max(error, 1e-12)), xs, ys))
                yield (tensor.name, t), 0.0 if error == 0 else float(cost)
        for layer in inventory.moe_layers:
            decision = f"blk.{layer}.experts"
            for criterion in self.space.criteria:
                yield from self._pruning(decision, layer, criterion, measured)
            for k in self.space.top_k_options:
                yield (f"blk.{layer}.top_k", k), float(measured.get((f"blk.{layer}.top_k", k), 0.0))

    def _pruning(
        self, decision: str, layer: int, criterion: str, measured: Mapping[Option, float]
    ) -> Iterable[tuple[Option, float]]:
        """Costs of every expert count under one ranking, interpolated between measured counts."""
        space = self.space
        by_experts = {
            space.experts(layer, n, c): cost for (d, (n, c)), cost in _pairs(measured) if d == decision
        }
        known = {
            n: by_experts[experts]
            for n in space.kept_options
            if (experts := space.experts(layer, n, criterion)) in by_experts
        }
        known[space.inventory.experts] = 0.0
        xs = sorted(known)
        ys = [known[n] for n in xs]
        for n in space.kept_options:
            yield (decision, (n, criterion)), float(np.interp(n, xs, ys))

    def columns(self, params: Mapping[str, Any]) -> list[int]:
        """Entries of `costs` that a set of parameters adds up."""
        out = [self.index[t.name, params[t.name]] for t in self.space.inventory.quantizable]
        for layer in self.space.inventory.moe_layers:
            kept, top_k = self.space.layer_choice(params, layer)
            out.append(self.index[f"blk.{layer}.experts", (kept, params[f"blk.{layer}.criterion"])])
            out.append(self.index[f"blk.{layer}.top_k", min(top_k, kept)])
        return out

    def predict(self, params: Mapping[str, Any]) -> float:
        """The additive prediction of KL, nats."""
        return float(self.costs[self.columns(params)].sum())


def _pairs(measured: Mapping[Option, float]) -> Iterable[tuple[tuple[str, tuple[int, str]], float]]:
    """The pruning options among the measured ones."""
    for (decision, choice), cost in measured.items():
        if decision.endswith(".experts"):
            yield (decision, choice), cost


def bits(params: Mapping[str, Any], space: Space) -> float:
    """Mean bits per stored weight of a set of parameters, pruned experts not counted."""
    total = weight = 0.0
    for tensor in space.inventory.quantizable:
        kept = (
            space.layer_choice(params, tensor.layer)[0]
            if tensor.per_expert and tensor.layer is not None
            else None
        )
        size = float(np.prod(tensor.kept_shape(kept)))
        total += size * QUANT_TYPES[params[tensor.name]].bits_per_weight
        weight += size
    return total / weight
