"""The exact multiple-choice knapsack: one option of every class, least cost within a byte budget.

Method: drop dominated options; solve the Lagrangian relaxation (its multiplier
is the slope where the convex hulls' greedy stops); fix every option whose
reduced cost exceeds the gap between the greedy solution and the bound; finish
with dynamic programming over the few options that are left, keeping only
states that are not dominated and whose bound stays under the incumbent.
After Pisinger, "A minimal algorithm for the multiple-choice knapsack problem"
(EJOR 83, 1995), with Pareto states in place of a byte-indexed table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spaces.errors import UserError

_MAX_STATES = 200_000


class InfeasibleError(UserError):
    """No choice fits the capacity."""

    def __init__(self, capacity: int, smallest: int) -> None:
        super().__init__(f"no config fits {capacity:,} bytes; the smallest possible takes {smallest:,}")
        self.smallest = smallest


@dataclass(frozen=True)
class OptionClass:
    """Options of one decision: `bytes` (n,) int64 and `costs` (n,) float64."""

    bytes: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True)
class Allocation:
    """A solution.

    Attributes:
        choice: Index of the chosen option of every class.
        bytes: Bytes in all, at most the capacity.
        cost: Cost in all.
        bound: No solution costs less than this.
        optimal: Whether `cost` is proved least.
    """

    choice: tuple[int, ...]
    bytes: int
    cost: float
    bound: float
    optimal: bool


def pareto(sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Indices of the options that no smaller or equal option undercuts, by ascending bytes."""
    order = np.lexsort((costs, sizes))
    best = np.minimum.accumulate(costs[order])
    keep = np.ones(len(order), bool)
    keep[1:] = costs[order][1:] < best[:-1]
    return order[keep]


def _hull(sizes: np.ndarray, costs: np.ndarray) -> list[int]:
    """Lower convex hull of Pareto-ordered points, as positions."""
    hull: list[int] = []
    for i in range(len(sizes)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            left = (costs[b] - costs[a]) * (sizes[i] - sizes[b])
            if left < (costs[i] - costs[b]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _greedy(classes: list[OptionClass], capacity: int) -> tuple[list[int], float]:
    """A feasible choice along the hulls and the Lagrangian multiplier (cost per byte)."""
    choice = [0] * len(classes)
    left = capacity - sum(int(c.bytes[0]) for c in classes)
    steps = []
    for j, c in enumerate(classes):
        hull = _hull(c.bytes, c.costs)
        for a, b in itertools.pairwise(hull):
            size = int(c.bytes[b] - c.bytes[a])
            steps.append(((c.costs[a] - c.costs[b]) / size, j, a, b, size))
    steps.sort(key=lambda s: (-s[0], s[1], s[2]))
    multiplier, broken = 0.0, False
    for slope, j, a, b, size in steps:
        if choice[j] != a:
            continue
        if size <= left:
            choice[j], left = b, left - size
        elif not broken:
            multiplier, broken = slope, True
    return _fill(classes, choice, left), multiplier


def _fill(classes: list[OptionClass], choice: list[int], left: int) -> list[int]:
    """Spends what is left on single upgrades, the largest gain first, until none fits."""
    while True:
        best, move = 0.0, None
        for j, c in enumerate(classes):
            fits = int(np.searchsorted(c.bytes, c.bytes[choice[j]] + left, side="right")) - 1
            gain = float(c.costs[choice[j]] - c.costs[fits])
            if gain > best:
                best, move = gain, (j, fits)
        if move is None:
            return choice
        j, fits = move
        left -= int(classes[j].bytes[fits] - classes[j].bytes[choice[j]])
        choice[j] = fits


def solve(classes: Sequence[OptionClass], capacity: int) -> Allocation:
    """Chooses one option per class so that bytes sum to at most `capacity` at least cost.

    Costs may be negative. Ties are broken towards fewer bytes and earlier classes,
    so equal inputs give equal answers.

    Raises:
        InfeasibleError: Even the smallest options exceed the capacity.
    """
    fronts = [pareto(c.bytes, c.costs) for c in classes]
    smallest = sum(int(c.bytes[f[0]]) for c, f in zip(classes, fronts, strict=True))
    if smallest > capacity:
        raise InfeasibleError(capacity, smallest)
    # Bytes above each class's smallest: large constants would round small gaps away.
    reduced = [
        OptionClass(c.bytes[f] - c.bytes[f[0]], c.costs[f]) for c, f in zip(classes, fronts, strict=True)
    ]
    room = capacity - smallest
    choice, multiplier = _greedy(reduced, room)

    slacks = []
    base_cost = 0.0
    for c in reduced:
        value = c.costs + multiplier * c.bytes
        slacks.append(value - value.min())
        base_cost += float(value.min())
    bound = base_cost - multiplier * room
    incumbent = sum(float(c.costs[i]) for c, i in zip(reduced, choice, strict=True))
    choice, optimal = _close_gap(reduced, slacks, choice, incumbent, bound, multiplier, room)

    picked = tuple(int(f[i]) for f, i in zip(fronts, choice, strict=True))
    total = sum(int(c.bytes[i]) for c, i in zip(classes, picked, strict=True))
    cost = float(sum(float(c.costs[i]) for c, i in zip(classes, picked, strict=True)))
    return Allocation(picked, total, cost, cost if optimal else bound, optimal)


def _close_gap(
    classes: list[OptionClass],
    slacks: list[np.ndarray],
    choice: list[int],
    incumbent: float,
    bound: float,
    multiplier: float,
    capacity: int,
) -> tuple[list[int], bool]:
    """Dynamic programming over the options whose reduced cost leaves a chance to improve."""
    tolerance = 1e-12 * max(1.0, abs(incumbent))
    gap = incumbent - bound - tolerance
    if gap <= 0:
        return choice, True
    open_options = [np.flatnonzero(s < gap) for s in slacks]
    order = sorted(range(len(classes)), key=lambda j: (-len(open_options[j]), j))
    floor = sum(int(classes[j].bytes[o].min()) for j, o in enumerate(open_options))
    sizes, used = np.array([floor], np.int64), np.zeros(1)
    trail: list[tuple[int, np.ndarray, np.ndarray]] = []
    optimal = True
    for j in order:
        options = open_options[j]
        extra = classes[j].bytes[options] - classes[j].bytes[options].min()
        new_sizes = (sizes[:, None] + extra[None, :]).ravel()
        new_used = (used[:, None] + slacks[j][options][None, :]).ravel()
        alive = np.flatnonzero((new_sizes <= capacity) & (new_used < gap))
        # Dominance in true cost: reduced cost less the multiplier's charge for the bytes.
        true_cost = new_used[alive] - multiplier * (new_sizes[alive] - floor)
        alive = alive[pareto(new_sizes[alive], true_cost)]
        if len(alive) > _MAX_STATES:
            optimal = False
            alive = alive[np.argsort(new_used[alive], kind="stable")[:_MAX_STATES]]
        if not len(alive):
            return choice, optimal
        trail.append((j, alive // len(options), options[alive % len(options)]))
        sizes, used = new_sizes[alive], new_used[alive]
    final = bound + used + multiplier * (capacity - sizes)
    best = int(final.argmin())
    if final[best] >= incumbent - tolerance:
        return choice, optimal
    improved = list(choice)
    for j, parent, option in reversed(trail):
        improved[j] = int(option[best])
        best = int(parent[best])
    return improved, optimal
