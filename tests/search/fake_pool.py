"""A pool that scores candidates by a formula, and a runner of trials on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna

from evaluators.footprint import Footprint
from evaluators.throughput import Throughput
from search.allocator import Allocator
from search.costs import Option
from search.pool import Job
from search.runner import TrialRunner
from spaces.budget import Budget
from spaces.candidate import Candidate
from spaces.devices import device

WINDOW = 256
SLOPE_PRICE = 12_345
"""Tokens that measuring slopes once is said to take."""

SlopeRows = list[tuple[str, str, float, float]]
"""(tensor, type, first, second)."""


def _even(candidate: Candidate, window: int) -> float:
    """A little spread between windows, none of it in the mean."""
    return 1.1 if window % 2 else 0.9


class FakePool:
    """Knows the scores, slopes and costs that workers would measure.

    Args:
        kl: KL of a candidate.
        size: Workers it claims to have.
        spread: Of a candidate and a window's place in the text, what the window's KL is multiplied by.
        slopes: Of a candidate, None for the uncompressed model; without it no slopes may be asked for.
        cost: Of an option and the tokens it is measured on; without it no costs may be asked for.
    """

    def __init__(
        self,
        kl: Callable[[Candidate], float] = lambda candidate: 1.0,
        size: int = 1,
        *,
        spread: Callable[[Candidate, int], float] = _even,
        slopes: Callable[[Candidate | None], SlopeRows] | None = None,
        cost: Callable[[Option, int], float] | None = None,
    ) -> None:
        self.kl, self.size, self.spread = kl, size, spread
        self.slopes_of, self.cost_of = slopes, cost
        self.scored: list[tuple[str, str, int, int]] = []
        """(candidate's key, text, first token, last token) of every candidate of every job."""
        self.sloped: list[str | None] = []
        """Key of every candidate whose slopes were measured."""
        self.priced: list[tuple[Option, int]] = []
        """(option, tokens) of every cost that was measured."""

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        out = []
        for i, (method, args) in enumerate(jobs):
            out.append({"score": self._score, "slopes": self._slopes, "costs": self._costs}[method](*args))
            on_result(i, out[-1])
        return out

    def _score(
        self, texts: Sequence[str], name: str, tokens: int, first: int = 0
    ) -> list[dict[str, list[float]]]:
        return [self._columns(Candidate.from_json(text), name, tokens, first) for text in texts]

    def _columns(self, candidate: Candidate, name: str, tokens: int, first: int) -> dict[str, list[float]]:
        self.scored.append((candidate.key, name, first, tokens))
        windows = range(first // WINDOW, tokens // WINDOW)
        kl = self.kl(candidate)
        return {
            "kl": [kl * self.spread(candidate, w) for w in windows],
            "nll": [2.0] * len(windows),
            "top1": [0.9] * len(windows),
        }

    def _slopes(self, candidate: str | None, tokens: int, probes: int) -> tuple[int, SlopeRows]:
        assert self.slopes_of is not None, "no slopes were to be measured"
        assert tokens > 0
        assert probes > 0
        chosen = None if candidate is None else Candidate.from_json(candidate)
        self.sloped.append(None if chosen is None else chosen.key)
        return SLOPE_PRICE, self.slopes_of(chosen)

    def _costs(self, options: Sequence[Option], tokens: int) -> list[float]:
        assert self.cost_of is not None, "no costs were to be measured"
        self.priced += [(option, tokens) for option in options]
        return [self.cost_of(option, tokens) for option in options]

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        raise AssertionError("no trial needs a broadcast")

    def close(self) -> None:
        raise AssertionError("the runner does not own its pool")


def make_runner(
    study: optuna.Study, allocator: Allocator, pool: FakePool, *, slopes: bool = False
) -> TrialRunner:
    budget = Budget(allocator.limit, 10**12, 512, 1000, 2000, 3000)
    return TrialRunner(
        study, allocator, pool, Footprint(allocator.carry, budget),
        Throughput(allocator.carry, device("dgx-spark"), 512), bytes_per_token=4.0, window=WINDOW,
        slopes=slopes,
    )  # fmt: skip
