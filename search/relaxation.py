"""A near-optimal allocation in milliseconds: the Lagrangian relaxation, then fills and swaps.

A sampler solves one knapsack per draw, and a draw is itself a guess: what it needs
is an allocation close to the best (0 to 2 % above it on the reference model), fast at hundreds of
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

_CLOSE = 1.02  # ratio of prices that ends the bisection: what it leaves is spent by the exchanges
_SWAPS = 24
_PAIRED = 96  # upgrades and downgrades, the most promising, that are tried against each other
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
    """What is cheapest at a price per byte: `types` (L, N, S) for every count, `counts` the chosen ones.

    `value` is cost and priced bytes in all; less price x room, no choice costs less than it.
    """

    price: float
    bytes: int
    value: float
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
        if not self.alike:
            priced = self._priced(self._pricing(plain, stacked, pruning, None), None)
            first, counts = self._exchange_counts(plain, stacked, pruning, priced)
            types = priced.types[np.arange(len(counts)), counts]
            return self._polish(plain, stacked, pruning, first, counts, types)
        found: Choice | None = None
        smallest = price = None
        for n in range(pruning.shape[1]):
            try:
                priced = self._priced(self._pricing(plain, stacked, pruning, np.array([n])), price)
            except InfeasibleError as error:
                smallest = min(smallest or error.smallest, error.smallest)
                continue
            price = priced.price or price
            # What the relaxation cannot beat need not be polished.
            if found is not None and priced.value - priced.price * self.room >= found.cost:
                continue
            counts = np.full(len(pruning), n)
            choice = self._polish(plain, stacked, pruning, priced.first, counts, priced.types[:, 0])
            if found is None or choice.cost < found.cost:
                found = choice
        if found is None:
            raise InfeasibleError(self.room, smallest or 0)
        return found

    def _pricing(
        self, plain: np.ndarray, stacked: np.ndarray, pruning: np.ndarray, allowed: np.ndarray | None
    ) -> Callable[[float], _Priced]:
        """What is cheapest, as a function of the price per byte; of some expert counts, or of all."""
        k = self.classes
        sizes = k.stacked_bytes if allowed is None else k.stacked_bytes[:, allowed]
        router = k.count_bytes if allowed is None else k.count_bytes[:, allowed]
        prune = pruning if allowed is None else pruning[:, allowed]
        everyone, rows = np.arange(len(plain)), np.arange(len(prune))

        def at(price: float) -> _Priced:
            single = plain + price * k.plain_bytes
            first = single.argmin(1)
            priced = stacked[:, None] + price * sizes
            types = priced.argmin(3)
            values = priced.min(3).sum(2) + prune + price * router
            counts = values.argmin(1)
            chosen = np.take_along_axis(sizes[rows, counts], types[rows, counts][..., None], 2)
            total = int(k.plain_bytes[everyone, first].sum() + router[rows, counts].sum() + chosen.sum())
            value = float(single[everyone, first].sum() + values[rows, counts].sum())
            return _Priced(price, total, value, first, counts, types)

        return at

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

    def _priced(self, at: Callable[[float], _Priced], guess: float | None) -> _Priced:
        """What about the lowest price gives at which everything fits; looked for about a guess."""
        best = at(0.0)
        if best.bytes <= self.room:
            return best
        high, step = guess or 1e-9, 8.0 if guess is None else 1.5
        while (best := at(high)).bytes > self.room:
            high, step = high * step, step * 1.5
            if high > 1e9:
                raise InfeasibleError(self.room, best.bytes)
        low = high / step
        while low > 1e-15 and (tried := at(low)).bytes <= self.room:
            best, high, low = tried, low, low / step
        while high > _CLOSE * low:
            middle = (low * high) ** 0.5
            tried = at(middle)
            if tried.bytes <= self.room:
                best, high = tried, middle
            else:
                low = middle
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
        r, o = _near(where, costs)
        pays, saves = gain[r, o] > 0, extra[r, o] < 0
        up = _promising(r[pays], o[pays], gain, extra)
        down = _promising(r[saves], o[saves], gain, extra)
        if not len(up[0]) or not len(down[0]):
            break
        total = gain[up][:, None] + gain[down][None]
        bad = (extra[up][:, None] + extra[down][None] > left) | (up[0][:, None] == down[0][None])
        total[bad] = -np.inf
        pair = int(total.argmax())
        if total.flat[pair] <= 1e-15:
            break
        u, d = divmod(pair, total.shape[1])
        where[up[0][u]], where[down[0][d]] = up[1][u], down[1][d]
    return where


def _near(where: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes and options a few steps from where each class stands."""
    classes, options = [], []
    for step in (s for s in range(-_NEAREST, _NEAREST + 1) if s):
        option = where + step
        there = np.flatnonzero((option >= 0) & (option < costs.shape[1]))
        there = there[np.isfinite(costs[there, option[there]])]
        classes.append(there)
        options.append(option[there])
    return np.concatenate(classes), np.concatenate(options)


def _promising(
    classes: np.ndarray, options: np.ndarray, gain: np.ndarray, extra: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The moves that gain most, or lose least, per byte."""
    rate = gain[classes, options] / np.maximum(1, np.abs(extra[classes, options]))
    order = np.argsort(-rate, kind="stable")[:_PAIRED]
    return classes[order], options[order]
