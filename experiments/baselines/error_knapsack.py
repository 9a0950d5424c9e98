"""Least imatrix-weighted error within the bytes: `llama-quantize --target-size` of llama.cpp PR #15550.

Method (E. Addario's pull request, open since August 2025): quantize samples of every tensor to every type;
its error is the weighted relative squared error of a row, summed over rows. Of each tensor only
the lower convex hull of (bytes, error) stays. A Lagrangian multiplier, found by bisection, gives
every tensor the type with the least error + mu * bytes; tensors thought important (`attn_v`,
`attn_output`, `ffn_down`, `ffn_down_exps`, `output`) pay a fifth of mu. What bytes are left go,
in one greedy pass, to the upgrades along the hull with the most error removed per byte. The
model is never run.

Deviations:

* The error of a tensor is the ratio of its sums over all rows, times the rows, instead of the sum of the
  ratios of sampled rows. The optional terms (bias, kurtosis) are off, as without activation statistics.
* Types are this project's ladder: with IQ3_S, without IQ4_NL where rows are multiples of 256.
* MLA's `attn_v_b` counts as `attn_v`.
* It does not prune. Where even the smallest types do not fit, it warns and returns too large a file; here
  the largest expert count that fits is kept, ranked by REAP.
* The pull request has changed: later versions of it favour the output alone, by a factor of two. These are
  the rules it was discussed and measured with.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from experiments.baselines.lab import Lab
from experiments.baselines.method import candidate_of, fitting_counts, room, sizes
from spaces.allocation import pareto

IMPORTANT = frozenset({"attn_v", "attn_v_b", "attn_output", "ffn_down", "ffn_down_exps", "output"})
_FAVOUR = 5.0
_HALVINGS = 60


@dataclass(frozen=True)
class Hull:
    """A tensor's types worth considering, by ascending bytes: `types`, `bytes` and `errors`, all (n,)."""

    name: str
    types: tuple[str, ...]
    bytes: np.ndarray
    errors: np.ndarray
    favour: float

    def cheapest(self, price: float) -> int:
        """The position with the least error + price * bytes; the smaller of equals."""
        return int(np.argmin(self.errors + price / self.favour * self.bytes))

    def gain(self, at: int) -> float:
        """Error removed per byte by the next step, as the greedy pass ranks it."""
        step = float(self.errors[at] - self.errors[at + 1]) / int(self.bytes[at + 1] - self.bytes[at])
        return step * self.favour


def convex(size: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices of the lower convex hull of (bytes, error), from the smallest option to the least error."""
    front = pareto(size, error)
    hull = [0]
    while hull[-1] < len(front) - 1:
        at = front[hull[-1]]
        rest = front[hull[-1] + 1 :]
        slopes = (error[rest] - error[at]) / (size[rest] - size[at])
        hull.append(hull[-1] + 1 + int(np.argmin(slopes)))
    return front[hull]


def hulls(lab: Lab, kept: int) -> list[Hull]:
    """Every tensor's hull at an expert count."""
    out, of = [], sizes(lab, kept)
    for t in lab.inventory.quantizable:
        types = lab.space.ladder(t)
        rows = float(np.prod(t.kept_shape(kept)[:-1]))
        error = np.array([rows * lab.errors[t.name, q] for q in types])
        on = convex(of[t.name], error)
        favour = _FAVOUR if t.role in IMPORTANT else 1.0
        out.append(Hull(t.name, tuple(types[i] for i in on), of[t.name][on], error[on], favour))
    return out


def _total(tensors: list[Hull], choice: list[int]) -> int:
    return sum(int(t.bytes[i]) for t, i in zip(tensors, choice, strict=True))


def _bisect(tensors: list[Hull], capacity: int) -> list[int]:
    """Positions at the lowest price that fits; the smallest ones are known to fit."""

    def at(price: float) -> list[int]:
        return [t.cheapest(price) for t in tensors]

    if _total(tensors, at(0.0)) <= capacity:
        return at(0.0)
    low, high = 0.0, 1e-9
    while _total(tensors, at(high)) > capacity:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(tensors, at(middle)) <= capacity else (middle, high)
    return at(high)


def _upgrade(tensors: list[Hull], choice: list[int], left: int) -> list[int]:
    """Spends what is left along the hulls; a step that does not fit is dropped: room only shrinks."""
    choice = list(choice)
    heap = [
        (-t.gain(i), j) for j, (t, i) in enumerate(zip(tensors, choice, strict=True)) if i + 1 < len(t.types)
    ]
    heapq.heapify(heap)
    while heap:
        _, j = heapq.heappop(heap)
        t, i = tensors[j], choice[j]
        step = int(t.bytes[i + 1] - t.bytes[i])
        if step > left:
            continue
        choice[j], left = i + 1, left - step
        if i + 2 < len(t.types):
            heapq.heappush(heap, (-t.gain(i + 1), j))
    return choice


def error_knapsack(lab: Lab) -> None:
    """The pull request's types at the largest expert count that fits; no tokens."""
    kept = fitting_counts(lab)[-1]
    tensors, capacity = hulls(lab, kept), room(lab, kept)
    choice = _bisect(tensors, capacity)
    choice = _upgrade(tensors, choice, capacity - _total(tensors, choice))
    types = {t.name: t.types[i] for t, i in zip(tensors, choice, strict=True)}
    lab.offer(candidate_of(lab, types, kept))
