"""A near-optimal allocation in milliseconds: the Lagrangian relaxation, then fills and swaps.

A sampler solves one knapsack per draw, and a draw is itself a guess: what it needs
is an allocation within a fraction of a percent of the best, fast at hundreds of
decisions and without the combinations of counts and types that the exact solver
lists. For a price of bytes every decision is independent (types given a layer's
expert count, then the count), so one array operation answers all of them; the
price is found by bisection. What is left is spent on the best upgrades that fit,
then on exchanges of one upgrade against one downgrade.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spaces.allocation import InfeasibleError

_BISECTIONS = 40
_SWAPS = 24
_NEAREST = 2  # steps up or down the ladder that an exchange tries


@dataclass(frozen=True)
class Classes:
    """Decisions as padded arrays; a missing option has infinite cost.

    Attributes:
        plain_bytes: (P, O) bytes of every type of tensors that no count changes.
        plain_columns: (P, O) places in a cost vector; -1 where there is no option.
        stacked_bytes: (L, N, S, O) bytes of layer, count, tensor, type.
        stacked_columns: (L, S, O).
        count_bytes: (L, N) bytes of what follows the count alone (router).
    """

    plain_bytes: np.ndarray
    plain_columns: np.ndarray
    stacked_bytes: np.ndarray
    stacked_columns: np.ndarray
    count_bytes: np.ndarray


@dataclass(frozen=True)
class Choice:
    """Positions chosen: `plain` (P,), `counts` (L,), `stacked` (L, S)."""

    plain: np.ndarray
    counts: np.ndarray
    stacked: np.ndarray
    cost: float


@dataclass(frozen=True)
class _Priced:
    """What is cheapest at a price per byte: `types` (L, N, S) for every count, `counts` the chosen ones."""

    bytes: int
    first: np.ndarray
    counts: np.ndarray
    types: np.ndarray


def _joined(a: np.ndarray, b: np.ndarray, fill: float) -> np.ndarray:
    """Rows of `a`, then of `b`, the narrower filled up."""
    out = np.full((len(a) + len(b), max(a.shape[1], b.shape[1])), fill)
    out[: len(a), : a.shape[1]] = a
    out[len(a) :, : b.shape[1]] = b
    return out


def table(rows: Sequence[Sequence[int] | np.ndarray], fill: int) -> np.ndarray:
    """(len(rows), longest) int64, short rows filled up."""
    width = max((len(r) for r in rows), default=0)
    out = np.full((len(rows), width), fill, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Relaxation:
    """Allocates for one cost vector after the other.

    Args:
        classes: What may be chosen and its bytes.
        room: Bytes for all of it.
        alike: Whether all layers keep the same count.
    """

    def __init__(self, classes: Classes, room: int, alike: bool) -> None:
        self.classes, self.room, self.alike = classes, room, alike

    def best(self, costs: np.ndarray, pruning: np.ndarray) -> Choice:
        """A cheap choice that fits.

        Args:
            costs: (options,) cost of every type of every tensor, where the columns point.
            pruning: (L, N) cost of every expert count of every layer.

        Raises:
            InfeasibleError: Nothing fits.
        """
        k = self.classes
        extended = np.append(costs, np.inf)
        plain, stacked = extended[k.plain_columns], extended[k.stacked_columns]
        found: Choice | None = None
        smallest = None
        fixed = [np.array([n]) for n in range(pruning.shape[1])] if self.alike else [None]
        for counts in fixed:
            try:
                choice = self._solve(plain, stacked, pruning, counts)
            except InfeasibleError as error:
                smallest = min(smallest or error.smallest, error.smallest)
                continue
            if found is None or choice.cost < found.cost:
                found = choice
        if found is None:
            raise InfeasibleError(self.room, smallest or 0)
        return found

    def _solve(
        self, plain: np.ndarray, stacked: np.ndarray, pruning: np.ndarray, allowed: np.ndarray | None
    ) -> Choice:
        k = self.classes
        sizes = k.stacked_bytes if allowed is None else k.stacked_bytes[:, allowed]
        router = k.count_bytes if allowed is None else k.count_bytes[:, allowed]
        prune = pruning if allowed is None else pruning[:, allowed]

        def at(price: float) -> _Priced:
            first = np.argmin(plain + price * k.plain_bytes, axis=1)
            priced = stacked[:, None] + price * sizes
            types = np.argmin(priced, axis=3)
            values = np.take_along_axis(priced, types[..., None], 3)[..., 0].sum(2) + prune + price * router
            counts = np.argmin(values, axis=1)
            rows = np.arange(len(counts))
            total = int(k.plain_bytes[np.arange(len(first)), first].sum()) + int(router[rows, counts].sum())
            total += int(np.take_along_axis(sizes[rows, counts], types[rows, counts][..., None], 2).sum())
            return _Priced(total, first, counts, types)

        found = self._priced(at)
        first, counts = found.first, found.counts
        if allowed is None:
            first, counts = self._exchange_counts(plain, stacked, prune, found)
        chosen = found.types[np.arange(len(counts)), counts]
        return self._polish(
            plain, stacked, pruning, first, counts if allowed is None else allowed[counts], chosen
        )

    def _exchange_counts(
        self, plain: np.ndarray, stacked: np.ndarray, pruning: np.ndarray, found: _Priced
    ) -> tuple[np.ndarray, np.ndarray]:
        """Better counts: their steps are large, so that a price alone leaves much unspent."""
        k, types = self.classes, found.types[..., None]
        layer_bytes = np.take_along_axis(k.stacked_bytes, types, 3)[..., 0].sum(2) + k.count_bytes
        layer_costs = (
            np.take_along_axis(stacked[:, None] + 0 * k.stacked_bytes, types, 3)[..., 0].sum(2) + pruning
        )
        sizes = _joined(k.plain_bytes, layer_bytes, 0).astype(np.int64)
        costs = _joined(plain, layer_costs, np.inf)
        where = improve(sizes, costs, np.concatenate([found.first, found.counts]), self.room)
        return where[: len(plain)], where[len(plain) :]

    def _priced(self, at: Callable[[float], _Priced]) -> _Priced:
        """What the lowest price gives at which everything fits."""
        low, high = 0.0, 1e-9
        best = at(low)
        if best.bytes <= self.room:
            return best
        while (best := at(high)).bytes > self.room:
            low, high = high, 8 * high
            if high > 1e9:
                raise InfeasibleError(self.room, best.bytes)
        for _ in range(_BISECTIONS):
            middle = (low * high) ** 0.5 if low else high / 8
            tried = at(middle)
            if tried.bytes <= self.room:
                best, high = tried, middle
            else:
                low = middle
            if high - low < 1e-3 * high:
                break
        return best

    def _polish(
        self,
        plain: np.ndarray,
        stacked: np.ndarray,
        pruning: np.ndarray,
        first: np.ndarray,
        counts: np.ndarray,
        chosen: np.ndarray,
    ) -> Choice:
        """Spends what is left, at the expert counts found."""
        k = self.classes
        layers, tensors = len(counts), stacked.shape[1]
        rows = np.arange(layers)

        costs = _joined(plain, stacked.reshape(layers * tensors, -1), np.inf)
        sizes = _joined(k.plain_bytes, k.stacked_bytes[rows, counts].reshape(layers * tensors, -1), 0).astype(
            np.int64
        )
        where = np.concatenate([first, chosen.reshape(-1)])
        left = self.room - int(k.count_bytes[rows, counts].sum())
        where = improve(sizes, costs, where, left)
        total = float(costs[np.arange(len(where)), where].sum() + pruning[rows, counts].sum())
        split = len(first)
        return Choice(where[:split], counts, where[split:].reshape(layers, tensors), total)


def improve(sizes: np.ndarray, costs: np.ndarray, where: np.ndarray, room: int) -> np.ndarray:
    """Better positions of classes within `room` bytes: upgrades that fit, then exchanges.

    Args:
        sizes: (C, O) bytes, ascending along the options that exist.
        costs: (C, O); infinite where there is no option.
        where: (C,) positions to start from; they must fit.
        room: Bytes in all.
    """
    rows, where = np.arange(len(where)), where.copy()
    for _ in range(_SWAPS):
        here, size = costs[rows, where], sizes[rows, where]
        left = room - int(size.sum())
        gain = here[:, None] - costs
        extra = sizes - size[:, None]
        fits = np.where(extra <= left, gain, -np.inf)
        single = int(fits.argmax())
        if fits.flat[single] > 0:
            where[single // fits.shape[1]] = single % fits.shape[1]
            continue
        moves = _near(where, costs)
        up = [(r, o) for r, o in moves if gain[r, o] > 0]
        down = [(r, o) for r, o in moves if extra[r, o] < 0]
        if not up or not down:
            break
        (ur, uo), (dr, do) = np.array(up).T, np.array(down).T
        total = gain[ur, uo][:, None] + gain[dr, do][None]
        bad = (extra[ur, uo][:, None] + extra[dr, do][None] > left) | (ur[:, None] == dr[None])
        total[bad] = -np.inf
        pair = int(total.argmax())
        if total.flat[pair] <= 1e-15:
            break
        u, d = divmod(pair, total.shape[1])
        where[ur[u]], where[dr[d]] = uo[u], do[d]
    return where


def _near(where: np.ndarray, costs: np.ndarray) -> list[tuple[int, int]]:
    """(class, option) a few steps from where each class stands."""
    out = []
    for step in (s for s in range(-_NEAREST, _NEAREST + 1) if s):
        option = where + step
        there = np.flatnonzero((option >= 0) & (option < costs.shape[1]))
        there = there[np.isfinite(costs[there, option[there]])]
        out += list(zip(there.tolist(), option[there].tolist(), strict=True))
    return out
