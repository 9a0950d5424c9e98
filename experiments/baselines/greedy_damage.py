"""Cheapest damage per byte saved, by a heap: the greedy method of the GGUF-Tool-Suite.

Method (github.com/Thireus/GGUF-Tool-Suite, quant_assign.py --use-greedy-quant-assign): one number
per tensor, the KL with that tensor alone in a low type; one number per type, the KL of the
whole model in that type. Damage is the product, summed over tensors. All tensors begin in
the best type; the step down that adds the least damage per byte saved is taken until the bytes
suffice; then the step up that removes the most damage per byte is taken while one fits. The
exponent on sensitivities is 1, its default where both numbers belong to the model. No recipe is run.

Deviations:

* Its measurements take days of whole-text runs; here `COST_TOKENS` for every tensor and type, or less
  if short of them.
* Tensors whose rows take no 256-weight block cannot be put into the same low type as the rest. Theirs is
  their lowest, and its KL is divided by that type's place on the curve (elsewhere a constant factor).
  Types without a uniform model of their own are interpolated on the curve by bits, as its tool
  group0_enricher fills gaps.
* Types that are no better than a smaller one on the curve are left out, or no step would lead past them.
* One class of tensors and one budget instead of two; no pinned tensors, outliers or vetoes (they belong to
  its other methods).
* It does not prune. Where the smallest types do not fit, experts as in `kl_knapsack`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from experiments.baselines.lab import Lab
from experiments.baselines.method import affordable, candidate_of, room, sizes
from experiments.baselines.simple import count_for_types, uniform_types
from spaces.allocation import pareto
from spaces.quant_types import LADDER, QUANT_TYPES

COST_TOKENS = 1024
_LEAST = 1e-9  # nats; keeps logarithms finite


@dataclass(frozen=True)
class Pool:
    """A tensor's types by ascending bytes, with bytes and damage of each, (n,)."""

    types: tuple[str, ...]
    bytes: np.ndarray
    damage: np.ndarray

    def score(self, low: int) -> float:
        """Damage per byte between position `low` and the next."""
        return float(self.damage[low] - self.damage[low + 1]) / int(self.bytes[low + 1] - self.bytes[low])


def curve(lab: Lab, types: set[str], tokens: int) -> dict[str, float]:
    """KL of the whole model in each type, nats; costs `tokens` for every type of the ladder."""
    everything = lab.inventory.experts
    models = [candidate_of(lab, uniform_types(lab.space, t), everything) for t in LADDER]
    found = dict(zip(LADDER, lab.mean(models, tokens), strict=True))
    ladder = sorted(LADDER, key=lambda t: QUANT_TYPES[t].bits_per_weight)
    bits = [QUANT_TYPES[t].bits_per_weight for t in ladder]
    logs = [np.log(max(found[t], _LEAST)) for t in ladder]
    between = {
        t: float(np.exp(np.interp(QUANT_TYPES[t].bits_per_weight, bits, logs))) for t in types - set(LADDER)
    }
    return {**found, **between}


def pools(lab: Lab, kept: int) -> dict[str, Pool]:
    """Every tensor's pool at an expert count; costs the curve and `COST_TOKENS` for every tensor."""
    tensors, of = lab.inventory.quantizable, sizes(lab, kept)
    tokens = affordable(lab, len(LADDER) + len(tensors), COST_TOKENS)
    degradation = curve(lab, {q for t in tensors for q in lab.space.ladder(t)}, tokens)
    low = {t.name: lab.space.ladder(t)[0] for t in tensors}
    alone = lab.costs([(t.name, low[t.name]) for t in tensors], tokens)
    out = {}
    for t in tensors:
        types = lab.space.ladder(t)
        sensitivity = max(alone[t.name, low[t.name]], 0.0) / max(degradation[low[t.name]], _LEAST)
        damage = np.array([degradation[q] for q in types])
        on = pareto(of[t.name], damage)
        out[t.name] = Pool(tuple(types[i] for i in on), of[t.name][on], sensitivity * damage[on])
    return out


def _descend(tensors: dict[str, Pool], capacity: int) -> tuple[dict[str, int], int]:
    """Positions after the cheapest steps down that suffice, and the bytes then left."""
    at = {name: len(p.types) - 1 for name, p in tensors.items()}
    left = capacity - sum(int(p.bytes[-1]) for p in tensors.values())
    heap = [(p.score(at[name] - 1), name) for name, p in tensors.items() if at[name]]
    heapq.heapify(heap)
    while left < 0:
        _, name = heapq.heappop(heap)
        p, i = tensors[name], at[name]
        at[name], left = i - 1, left + int(p.bytes[i] - p.bytes[i - 1])
        if i > 1:
            heapq.heappush(heap, (p.score(i - 2), name))
    return at, left


def _promote(tensors: dict[str, Pool], at: dict[str, int], left: int) -> dict[str, int]:
    """Takes the best step up that fits until none does."""
    at = dict(at)
    heap = [(-p.score(at[name]), name) for name, p in tensors.items() if at[name] + 1 < len(p.types)]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        p, i = tensors[name], at[name]
        step = int(p.bytes[i + 1] - p.bytes[i])
        if step > left:
            continue
        at[name], left = i + 1, left - step
        if i + 2 < len(p.types):
            heapq.heappush(heap, (-p.score(i + 1), name))
    return at


def greedy_damage(lab: Lab) -> None:
    """The greedy recipe for measured sensitivities and curve."""
    kept = count_for_types(lab)
    tensors = pools(lab, kept)
    at = _promote(tensors, *_descend(tensors, room(lab, kept)))
    lab.offer(candidate_of(lab, {name: p.types[at[name]] for name, p in tensors.items()}, kept))
