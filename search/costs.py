"""The additive cost model: what each option alone does to KL, and how they add up.

An option's cost is the KL it causes when everything else is left as it is: measured
for some, and for every type of every tensor estimated from gradients (see
`evaluators.slopes`). Between measured types it follows the gradients' shape, or
where there are none (a streamed model) the bank's imatrix-weighted error: damage is
linear in error (HIGGS, arXiv 2411.17525). Damage of many options together is close
to the sum (the sampler learns how far from it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spaces.inventory import Tensor
from spaces.space import Space

Option = tuple[str, Any]
"""(decision, choice): ("blk.2.experts", (12, "reap")), ("blk.2.top_k", 3) or (tensor name, type)."""

Probe = tuple[Option, int]
"""An option and the tokens it is measured on."""

_LEAST = 1e-7  # nats; below what float32 logits resolve

# Measured costs over the gradients' (reference model, 8,192 tokens): what a change does by making later
# routers choose other experts is in no gradient.
_EXPERTS, _OTHERS = 1.7, 4.5
_UNTRIED = 1.3  # a ranking that was not tried, against the one measured most

_PROBED_EXPERT_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q4_K")
_PROBED_TYPES = ("IQ1_S", "IQ3_XXS", "Q5_K", "IQ4_NL", "Q8_0")


@dataclass(frozen=True)
class Effort:
    """How much is spent on costs before the first trial.

    Attributes:
        slope_tokens, slope_probes: Of the gradient pass at the uncompressed model; 0 tokens for none.
        expert_types, other_types: Types measured one at a time; () for none.
        type_tokens: On so many tokens.
        routing_tokens: Tokens of expert counts and top-k.
        rankings: How many rankings are tried, the last ones first; None for all.
        fractions: Of the experts, that are kept in what is tried; the first is where rankings are.
        top_k: Whether top-k is measured too, not only estimated.
    """

    slope_tokens: int
    slope_probes: int
    expert_types: tuple[str, ...]
    other_types: tuple[str, ...]
    type_tokens: int
    routing_tokens: int
    rankings: int | None = None
    fractions: tuple[float, ...] = (0.5, 0.25, 0.375, 0.625, 0.75, 0.875)
    top_k: bool = True

    def estimate_tokens(self, space: Space) -> int:
        """Tokens of forward pass that the gradients take; see `evaluators.slopes.Slopes.tokens`."""
        options = len(routing_estimates(space, self))
        blocks = -(-self.slope_tokens * options // space.inventory.layers)
        return self.slope_tokens * (2 + 2 * self.slope_probes) + blocks


LEAN = Effort(512, 1, (), (), 0, 256, rankings=1, fractions=(0.5, 0.25, 0.75), top_k=False)
"""The default: gradients, and three expert counts of every layer; 6,000 tokens on the reference model."""

FULL = Effort(2048, 4, ("IQ1_S", "IQ2_S", "IQ3_XXS"), ("IQ1_S", "Q5_K", "IQ4_NL", "Q8_0"), 1024, 2048)
"""Every tensor measured: a better start for forty times the tokens, which trials put to better use."""

STREAMED = Effort(0, 0, _PROBED_EXPERT_TYPES, _PROBED_TYPES, 2048, 2048)
"""No gradients: a model larger than memory is not differentiated."""

EFFORTS = {"full": FULL, "lean": LEAN, "streamed": STREAMED}


def type_probes(space: Space, effort: Effort) -> list[Probe]:
    """Types to measure one at a time, with the tokens of each; the others are interpolated."""
    out: list[Probe] = []
    for tensor in space.inventory.quantizable:
        wanted = effort.expert_types if tensor.per_expert else effort.other_types
        if not wanted:
            continue
        types = [t for t in space.ladder(tensor) if t in wanted] or list(space.ladder(tensor))
        # Q8_0 is lossless enough to be interpolated where a long ladder has Q5_K.
        out += [((tensor.name, t), effort.type_tokens) for t in types if t != "Q8_0" or tensor.row % 256]
    return out


def _counts(space: Space, effort: Effort) -> list[int]:
    """Expert counts to measure."""
    experts = space.inventory.experts
    nearest = [min(space.kept_options, key=lambda n: abs(n - f * experts)) for f in effort.fractions]
    return [n for n in dict.fromkeys(nearest) if n < experts]


def ranking_probes(space: Space, effort: Effort) -> list[Probe]:
    """Every ranking at one count of every layer, and every top-k."""
    out: list[Probe] = []
    for layer in space.inventory.moe_layers:
        seen = set()
        for kept in _counts(space, effort)[:1]:
            for criterion in space.criteria[::-1][: effort.rankings]:
                experts = space.experts(layer, kept, criterion)
                if experts not in seen:
                    seen.add(experts)
                    out.append(((f"blk.{layer}.experts", (kept, criterion)), effort.routing_tokens))
        if effort.top_k:
            out += [((f"blk.{layer}.top_k", k), effort.routing_tokens) for k in _fewer(space)]
    return out


def _fewer(space: Space) -> list[int]:
    """Numbers of active experts to look at."""
    most = space.inventory.top_k
    return [k for k in space.top_k_options if k in {most - 1, most // 2} - {most}]


def routing_estimates(space: Space, effort: Effort) -> list[Option]:
    """A smaller top-k where it is not measured: gradients price well what it changes of a block's output."""
    if effort.top_k or not effort.slope_tokens:
        return []
    return [(f"blk.{layer}.top_k", k) for layer in space.inventory.moe_layers for k in _fewer(space)]


def count_probes(space: Space, effort: Effort, measured: Mapping[Probe, float]) -> list[Probe]:
    """The other counts of every layer, under the ranking that was best at the first one."""
    out: list[Probe] = []
    for layer in space.inventory.moe_layers:
        decision = f"blk.{layer}.experts"
        at_first = [(cost, option[1][1]) for (option, _), cost in measured.items() if option[0] == decision]
        if at_first:
            _, criterion = min(at_first)
            out += [((decision, (n, criterion)), effort.routing_tokens) for n in _counts(space, effort)[1:]]
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
        estimated: Mapping[Option, float] | None = None,
    ) -> None:
        self.space = space
        self.index: dict[Option, int] = {}
        costs: list[float] = []
        for option, cost in self._complete(measured, errors, estimated or {}):
            self.index[option] = len(costs)
            costs.append(cost)
        self.costs = np.array(costs)

    def _types(
        self,
        tensor: Tensor,
        measured: Mapping[Option, float],
        errors: Mapping[tuple[str, str], float],
        shape: Mapping[Any, float],
    ) -> Iterable[tuple[Option, float]]:
        """Costs of every type of a tensor."""
        ladder = self.space.ladder(tensor)
        known = sorted(
            (np.log(max(shape[tensor.name, t], 1e-12)), np.log(max(measured[tensor.name, t], _LEAST)))
            for t in ladder
            if (tensor.name, t) in measured
        )
        if not known:  # rows no quantized type takes stay as they are
            factor = _EXPERTS if tensor.per_expert else _OTHERS
            for t in ladder:
                lossless = shape is errors or errors[tensor.name, t] == 0
                yield (tensor.name, t), 0.0 if lossless else factor * float(shape[tensor.name, t])
            return
        xs, ys = np.array([k[0] for k in known]), np.maximum.accumulate([k[1] for k in known])
        for t in ladder:
            exact = measured.get((tensor.name, t))
            at = np.log(max(shape[tensor.name, t], 1e-12))
            cost = exact if exact is not None else np.exp(_interpolate(at, xs, ys))
            yield (tensor.name, t), 0.0 if errors[tensor.name, t] == 0 else float(cost)

    def _complete(
        self,
        measured: Mapping[Option, float],
        errors: Mapping[tuple[str, str], float],
        estimated: Mapping[Option, float],
    ) -> Iterable[tuple[Option, float]]:
        inventory = self.space.inventory
        measured = {**_guesses(measured, estimated), **measured}
        for tensor in inventory.quantizable:
            guessed = all((tensor.name, t) in estimated for t in self.space.ladder(tensor))
            yield from self._types(tensor, measured, errors, estimated if guessed else errors)
        for layer in inventory.moe_layers:
            decision = f"blk.{layer}.experts"
            for criterion in self.space.criteria:
                yield from self._pruning(decision, layer, criterion, measured)
            yield from self._activation(f"blk.{layer}.top_k", measured)

    def _activation(self, decision: str, measured: Mapping[Option, float]) -> Iterable[tuple[Option, float]]:
        """Costs of every top-k: between and beyond measured ones the logarithm is linear in k."""
        known = sorted((k, c) for (d, k), c in measured.items() if d == decision)
        most = self.space.inventory.top_k
        xs, ys = np.array([k for k, _ in known]), np.log([max(c, _LEAST) for _, c in known])
        slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0]) if len(known) > 1 else 0.0
        for k in self.space.top_k_options:
            exact = measured.get((decision, k))
            if k == most or not known:
                cost = 0.0
            elif exact is not None:
                cost = exact
            else:
                inside = xs[0] <= k <= xs[-1]
                cost = float(np.exp(np.interp(k, xs, ys) if inside else ys[0] + slope * (k - xs[0])))
            yield (decision, k), cost

    def _pruning(
        self, decision: str, layer: int, criterion: str, measured: Mapping[Option, float]
    ) -> Iterable[tuple[Option, float]]:
        """Costs of every expert count under one ranking, interpolated between measured counts."""
        space = self.space
        by_experts = {
            space.experts(layer, n, c): cost for (d, (n, c)), cost in _pairs(measured) if d == decision
        }
        known = self._known(layer, criterion, by_experts)
        # A ranking measured at few counts has the shape of the one measured at most.
        fullest = max((self._known(layer, c, by_experts) for c in space.criteria), key=len)
        shared = [n for n in known if n in fullest and fullest[n] > 0]
        if len(fullest) > len(known):
            logs = [np.log(max(known[n], _LEAST) / fullest[n]) for n in shared] or [np.log(_UNTRIED)]
            ratio = float(np.exp(np.mean(logs)))
            known = {n: ratio * cost for n, cost in fullest.items()} | known
        known[space.inventory.experts] = 0.0
        xs = sorted(known)
        ys = [known[n] for n in xs]
        for n in space.kept_options:
            yield (decision, (n, criterion)), float(np.interp(n, xs, ys))

    def _known(
        self, layer: int, criterion: str, by_experts: Mapping[tuple[int, ...], float]
    ) -> dict[int, float]:
        """Measured costs of a ranking by count."""
        space = self.space
        return {
            n: by_experts[experts]
            for n in space.kept_options
            if (experts := space.experts(layer, n, criterion)) in by_experts
        }

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


def _guesses(measured: Mapping[Option, float], estimated: Mapping[Option, float]) -> dict[Option, float]:
    """Estimates of decisions about top-k of which nothing was measured."""
    known = {decision for decision, _ in measured}
    return {o: cost for o, cost in estimated.items() if o[0].endswith(".top_k") and o[0] not in known}


def _pairs(measured: Mapping[Option, float]) -> Iterable[tuple[tuple[str, tuple[int, str]], float]]:
    """The pruning options among the measured ones."""
    for (decision, choice), cost in measured.items():
        if decision.endswith(".experts"):
            yield (decision, choice), cost
