"""The Pareto front of a study, and what its pictures show of every trial."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spaces.space import PORTABLE, RAGGED

Point = tuple[float, float, float]
"""(KL, target bytes, tokens per second)."""

UNBEATEN = "not beaten in KL, size and speed"
FRONT = "front of KL and the axis below"


def dominates(a: Point, b: Point) -> bool:
    """`a` is as good as `b` in KL, bytes and speed, and better in one."""
    as_good = a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2]
    return as_good and a != b


def front(points: Sequence[Point]) -> list[int]:
    """Positions of the points no other dominates, by ascending KL."""
    best = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    return sorted(best, key=lambda i: (points[i], i))


def front_of(records: Sequence[dict[str, Any]]) -> list[int]:
    """Trial numbers on the front of result.json's complete trials, by ascending KL."""
    complete = [r for r in records if r["state"] == "COMPLETE"]
    points = [
        (r["scores"]["kl"], r["scores"]["target_bytes"], r["scores"]["tokens_per_second"]) for r in complete
    ]
    return [complete[i]["number"] for i in front(points)]


@dataclass(frozen=True)
class Mark:
    """A trial in a picture.

    Attributes:
        kl, kl_se: Nats per token, on the search text.
        gigabytes: Size of the target's file (10^9 bytes).
        speed: Predicted tokens/s of the target.
        form: portable or ragged.
        baseline: Name of a baseline.
        on_front: Whether no trial beats it in KL, bytes and speed together.
    """

    number: int
    kl: float
    kl_se: float
    gigabytes: float
    speed: float
    form: str
    baseline: str | None
    on_front: bool
    winner: bool
    complete: bool

    @property
    def label(self) -> str | None:
        """What is written beside it: winners and baselines have names."""
        if self.winner:
            return f"winner, {self.form}" + (f" ({self.baseline})" if self.baseline else "")
        return self.baseline


def marks(result: dict[str, Any]) -> list[Mark]:
    """Every trial of result.json; numbers that are not above 0 have no place on a log axis."""
    on_front, won = set(result["front"]), set(result["winners"].values())
    return [
        Mark(
            number=r["number"],
            kl=r["scores"]["kl"],
            kl_se=r["scores"]["kl_se"],
            gigabytes=r["scores"]["target_bytes"] / 1e9,
            speed=r["scores"]["tokens_per_second"],
            form=PORTABLE if r["portable"] else RAGGED,
            baseline=r.get("baseline"),
            on_front=r["number"] in on_front,
            winner=r["number"] in won,
            complete=r["state"] == "COMPLETE",
        )
        for r in result["trials"]
        if r["scores"]["kl"] > 0
    ]


def by_size(shown: Sequence[Mark]) -> list[Mark]:
    """The front of KL and size alone, by ascending size."""
    best = front([(m.kl, m.gigabytes, 0.0) for m in shown])
    return sorted((shown[i] for i in best), key=lambda m: m.gigabytes)


def by_speed(shown: Sequence[Mark]) -> list[Mark]:
    """The front of KL and speed alone, by ascending speed."""
    best = front([(m.kl, 0.0, m.speed) for m in shown])
    return sorted((shown[i] for i in best), key=lambda m: m.speed)


def named(shown: Sequence[Mark]) -> list[Mark]:
    """Those with a name, winners first."""
    return sorted((m for m in shown if m.label), key=lambda m: (not m.winner, -m.kl))


def corners(line: Sequence[tuple[float, float]], first_along: bool) -> list[tuple[float, float]]:
    """Corners of the steps through points by ascending x; each step goes along x first, or along y."""
    out = list(line[:1])
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        out += [(x1, y0) if first_along else (x0, y1), (x1, y1)]
    return out


@dataclass(frozen=True)
class Words:
    """Titles and axes of the pictures of one result.json."""

    title: str
    note: str
    kl: str
    size: str
    speed: str
    budget: str

    @classmethod
    def of(cls, result: dict[str, Any], hidden: str) -> Words:
        """Args: result.json, and where trials that were stopped early went (`are left out`)."""
        shown = marks(result)
        stopped = sum(not m.complete for m in shown)
        target, model = result["target"], result["model"]
        note = f"{len(shown) - stopped} trials, KL on the search text, before repairs"
        if stopped:
            note += f"; {stopped} stopped early, on fewer tokens, {hidden}"
        what = target if target == model else f"{model} for {target}"
        budget = f"{result['budget_bytes'] / 1e9:.4g} GB"
        return cls(
            title=f"{what} within {budget}",
            note=note,
            kl=f"KL(base || compressed) of {model} (nats per token)",
            size=f"file size of {target} (GB)",
            speed=f"predicted decode speed of {target} on {result['device']} (tokens/s)",
            budget=f"budget, {budget}",
        )
