"""Damage by position in the context: whether a compressed model gets worse the more it has read.

Positions are counted from 0 and grouped into buckets that double: 0-1, 2-3, 4-7, ... Standard errors
are over windows, since tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import t as student

from evaluators.divergence import TokenDivergence

Span = tuple[int, int]
"""First and last position of a bucket."""

_WORSE, _CHANCE = 0.1, 0.001  # nats that the base model must be worse by, and the chance of that by noise


def buckets(start: int, end: int, edge: int | None = None) -> list[Span]:
    """Doubling buckets of the positions from `start` up to, not including, `end`; none lies across `edge`."""
    powers = {2**k for k in range(1, end.bit_length())}
    cuts = sorted(c for c in {start, end, *powers, start if edge is None else edge} if start <= c <= end)
    return [(a, b - 1) for a, b in pairwise(cuts)]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of (n,) values and its standard error; infinite for a single one."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf


def _measures(tokens: TokenDivergence, first: int, last: int) -> dict[str, float]:
    """Means over some positions, with standard errors over windows."""
    some = slice(first, last + 1)
    columns = {
        "kl": tokens.kl,
        "nll": tokens.nll,
        "base_nll": tokens.base_nll,
        "nll_increase": tokens.nll - tokens.base_nll,
        "top1": tokens.top1,
    }
    out: dict[str, float] = {}
    for name, values in columns.items():
        out[name], out[f"{name}_se"] = mean_and_error(values[:, some].mean(1))
    for name in ("", "base_"):
        out[f"{name}perplexity"] = math.exp(min(out[f"{name}nll"], 700.0))
    return out


def by_position(tokens: TokenDivergence) -> list[dict[str, Any]]:
    """A row for every bucket.

    Returns:
        Rows of `first` and `last` position, `kl`, `nll`, `base_nll`, `nll_increase` (the candidate's over
        the base model's, paired by window), `top1`, each with its `_se`, `perplexity` and
        `base_perplexity`; `cumulative` has the same over all positions from 0 to `last`.
    """
    return [
        {"first": a, "last": b, **_measures(tokens, a, b), "cumulative": _measures(tokens, 0, b)}
        for a, b in buckets(0, tokens.kl.shape[1])
    ]


def usable_context(base_nll: np.ndarray) -> int | None:
    """How many tokens the base model makes use of; None where it does of all.

    A config may name a longer context than the model was trained on, and there is nothing to be damaged
    where the base model is lost itself: the first bucket it predicts worse than the one before, by 0.1
    nats and with p < 0.001 (one-sided t test, paired by window), is beyond its context.

    Args:
        base_nll: (n, positions) negative log-likelihood under the base model, n > 1.
    """
    spans = buckets(0, base_nll.shape[1])
    for before, span in pairwise(spans):
        then, now = (base_nll[:, a : b + 1].mean(1) for a, b in (before, span))
        rise, error = mean_and_error(now - then)
        if rise > _WORSE and (error == 0 or student.sf(rise / error, len(base_nll) - 1) < _CHANCE):
            return span[0]
    return None


@dataclass(frozen=True)
class Trend:
    """A straight line through log damage over log2 of position.

    Attributes:
        first: First position it is about.
        last: Last one.
        slope: Change of the logarithm of damage per doubling of the position.
        se: Its standard error, over windows.
        p: Two-sided p-value of no change, by Student's t of windows - 1 degrees of freedom.
    """

    first: int
    last: int
    slope: float
    se: float
    p: float


def trend(damage: np.ndarray, spans: Sequence[Span]) -> Trend | None:
    """Whether damage grows with position, each window being its own control.

    Least squares of log(mean over windows of a bucket's damage) on the bucket's mean log2(position + 1).
    The logarithm is of means, not a mean of logarithms, which would be lower in buckets of few tokens.
    Error and what remains of that bias are by the jackknife: the slope is taken again without each
    window in turn (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 and 11).

    Args:
        damage: (n, positions) damage, such as KL.
        spans: At least two buckets.

    Returns:
        None where there is nothing to follow: one window, or a bucket in which at most one window is damaged.
    """
    x = np.array([np.log2(np.arange(a, b + 1) + 1.0).mean() for a, b in spans])
    by_window = np.stack([damage[:, a : b + 1].mean(1) for a, b in spans], 1)
    n = len(by_window)
    without = (by_window.sum(0) - by_window) / max(n - 1, 1)
    if n < 2 or without.min() <= 0:
        return None
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slopes = np.log(without) @ weights
    slope = float(n * (np.log(by_window.mean(0)) @ weights) - (n - 1) * slopes.mean())
    se = math.sqrt((n - 1) / n * ((slopes - slopes.mean()) ** 2).sum())
    p = float(2 * student.sf(abs(slope) / se, n - 1)) if se > 0 else float(slope == 0)
    return Trend(spans[0][0], spans[-1][1], slope, se, p)
