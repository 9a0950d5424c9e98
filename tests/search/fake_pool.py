"""A pool that scores candidates by a formula, and a runner of trials on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna

from evaluators.footprint import Footprint
from evaluators.throughput import Throughput
from search.allocator import Allocator
from search.pool import Job
from search.study import TrialRunner
from spaces.budget import Budget
from spaces.candidate import Candidate
from spaces.devices import device

WINDOW = 256


class FakePool:
    """Gives every window of a text the same scores.

    Args:
        kl: KL of a candidate.
        size: Workers it claims to have.
    """

    def __init__(self, kl: Callable[[Candidate], float], size: int = 1) -> None:
        self.kl, self.size = kl, size
        self.scored: list[tuple[str, str, int, int]] = []
        """(candidate's key, text, first token, last token) of every job."""

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        out = []
        for i, (method, args) in enumerate(jobs):
            assert method == "score"
            texts, name, tokens, first = (*args, 0)[:4]
            out.append([self._columns(Candidate.from_json(text), name, tokens, first) for text in texts])
            on_result(i, out[-1])
        return out

    def _columns(self, candidate: Candidate, name: str, tokens: int, first: int) -> dict[str, list[float]]:
        self.scored.append((candidate.key, name, first, tokens))
        windows = (tokens - first) // WINDOW
        kl = self.kl(candidate)
        # A little spread between windows, none of it in the mean.
        spread = [kl * (1 + (0.1 if w % 2 else -0.1)) for w in range(windows)]
        return {"kl": spread, "nll": [2.0] * windows, "top1": [0.9] * windows}

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        raise AssertionError("no trial needs a broadcast")

    def close(self) -> None:
        raise AssertionError("the runner does not own its pool")


def make_runner(study: optuna.Study, allocator: Allocator, pool: FakePool) -> TrialRunner:
    budget = Budget(allocator.limit, 10**12, 512, 1000, 2000, 3000)
    return TrialRunner(
        study, allocator, pool, Footprint(allocator.carry, budget),
        Throughput(allocator.carry, device("dgx-spark"), 512), bytes_per_token=4.0, window=WINDOW,
    )  # fmt: skip
