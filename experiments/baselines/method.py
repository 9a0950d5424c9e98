"""What a method of the benchmark is, and the few things most of them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from evaluators.texts import WINDOW
from experiments.baselines.lab import Lab
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.gguf_layout import padded


class Unreachable(UserError):  # noqa: N818 (it says what the budget is, not what went wrong)
    """The method has no candidate within the budget, by its own rules."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unreachable: {reason}")


@dataclass(frozen=True)
class Method:
    """One row of the benchmark.

    Attributes:
        name: What tables call it.
        run: Spends tokens of a lab and offers candidates; raises `Unreachable` if it has none.
        source: Paper, repository or pull request.
        searches: Whether more tokens may change its result.
        levers: What it decides, of "experts", "top-k" and "types".
        published: Whether it is a method of others, at most adapted.
    """

    name: str
    run: Callable[[Lab], None]
    source: str
    searches: bool
    levers: str
    published: bool


def candidate_of(
    lab: Lab, types: Mapping[str, str], kept: int, criterion: str = "reap", top_k: int | None = None
) -> Candidate:
    """The same expert count, ranking and top-k in every layer (None: the model's top-k)."""
    return lab.space.candidate(lab.space.params(types, kept, criterion, top_k))


def fitting_counts(lab: Lab) -> list[int]:
    """Expert counts of which some types fit, fewest first.

    Raises:
        Unreachable: There are none.
    """
    counts = lab.counts_that_fit()
    if not counts:
        raise Unreachable(f"no expert count fits {lab.limit:,} bytes")
    return counts


def affordable(lab: Lab, measurements: int, tokens: int) -> int:
    """Tokens each of some measurements may take: `tokens`, or fewer whole windows if short of them.

    Raises:
        Unreachable: Not even one window for each is left.
    """
    tokens = min(tokens, lab.left // max(1, measurements) // WINDOW * WINDOW)
    if tokens < WINDOW:
        raise Unreachable(f"{lab.left:,} tokens are too few for {measurements} measurements")
    return tokens


def sizes(lab: Lab, kept: int) -> dict[str, np.ndarray]:
    """Tensor name to (types of its ladder,) int64 bytes in the file, with `kept` experts."""
    return {
        t.name: np.array([padded(t.bytes(q, kept)) for q in lab.space.ladder(t)], np.int64)
        for t in lab.inventory.quantizable
    }


def room(lab: Lab, kept: int) -> int:
    """Bytes there are for all quantizable tensors together; with `kept` experts the rest is fixed."""
    first = {t.name: lab.space.ladder(t)[0] for t in lab.inventory.quantizable}
    quantized = sum(int(b[0]) for b in sizes(lab, kept).values())
    return lab.limit - (lab.size(candidate_of(lab, first, kept)) - quantized)
