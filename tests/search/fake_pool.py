"""A pool that scores candidates by a formula, and a runner of trials on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna

from evaluators.footprint import Footprint
from evaluators.texts import TextSet
from evaluators.throughput import Throughput
from search.allocator import Allocator
from search.costs import Option
from search.pool import Job
from search.runner import TrialRunner
from spaces.budget import Budget
from spaces.candidate import Candidate
from spaces.devices import device

WINDOW = 256
TEXT = TextSet("search", np.zeros((64, WINDOW), np.int32), tuple("abcdefghi"[i % 9] for i in range(64)), 4.0)
"""As long as a search text, and of as many kinds."""

SlopeRows = list[tuple[str, Any, float, float]]
"""(decision, choice, first, second)."""


def _even(candidate: Candidate, window: int, length: int) -> float:
    """A little spread between windows, none of it in the mean."""
    return 1.1 if window % 2 else 0.9


class FakePool:
    """Knows the scores, slopes and costs that workers would measure.

    Args:
        kl: KL of a candidate.
        size: Workers it claims to have.
        spread: Of a candidate, a window's place in the text and how much of it is seen, what the window's
            KL is multiplied by.
        slopes: Of a candidate (None for the uncompressed model), tokens and probes; without it no slopes
            may be asked for.
        cost: Of an option and the tokens it is measured on; without it no costs may be asked for.
    """

    def __init__(
        self,
        kl: Callable[[Candidate], float] = lambda candidate: 1.0,
        size: int = 1,
        *,
        spread: Callable[[Candidate, int, int], float] = _even,
        slopes: Callable[[Candidate | None, int, int], SlopeRows] | None = None,
        cost: Callable[[Option, int], float] | None = None,
    ) -> None:
        self.kl, self.size, self.spread = kl, size, spread
        self.slopes_of, self.cost_of = slopes, cost
        self.tokens = 0
        """Of all scores and slopes."""
        self.scored: list[tuple[str, str, int]] = []
        """(candidate's key, text, tokens) of every candidate of every job."""
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

    def _score(self, texts: Sequence[str], name: str, tokens: int) -> list[dict[str, list[float]]]:
        return [self._columns(Candidate.from_json(text), name, tokens) for text in texts]

    def _columns(self, candidate: Candidate, name: str, tokens: int) -> dict[str, list[float]]:
        self.scored.append((candidate.key, name, tokens))
        count, length = (TEXT.spread(tokens) if name == "search" else TEXT.head(tokens)).windows.shape
        self.tokens += count * length
        kl = self.kl(candidate)
        return {
            "kl": [kl * self.spread(candidate, w, length) for w in range(count)],
            "nll": [2.0] * count,
            "top1": [0.9] * count,
        }

    def _slopes(
        self, candidate: str | None, tokens: int, probes: int, seed: int = 0, routing: Sequence[Option] = ()
    ) -> tuple[int, SlopeRows]:
        assert self.slopes_of is not None, "no slopes were to be measured"
        assert tokens > 0
        assert probes > 0
        chosen = None if candidate is None else Candidate.from_json(candidate)
        self.sloped.append(None if chosen is None else chosen.key)
        spent = TEXT.spread(tokens).windows.size * (4 + 2 * probes)
        self.tokens += spent
        rows = self.slopes_of(chosen, tokens, probes)
        if routing:
            assert self.cost_of is not None
            rows = rows + [(d, c, -1.0, self.cost_of((d, c), tokens)) for d, c in routing]
        return spent, rows

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
        Throughput(allocator.carry, device("dgx-spark"), 512), TEXT, slopes=slopes,
    )  # fmt: skip
