"""A worker that scores by a formula, on a made-up space; in a module of its own so that Ray can import it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from search.allocator import Allocator
from search.posterior import Curve
from search.worker import Setup
from spaces.candidate import Candidate
from tests.search import synthetic
from tests.search.fake_pool import TEXT
from tests.spaces import tiny

CURVE = Curve(0.0, 1.15)
"""KL of a sum of costs."""


@cache
def allocator() -> Allocator:
    """59 parameters; the measured costs are off the true ones by a factor of about 1.8."""
    return synthetic.allocator(tiny.space(), 0.15)


class SyntheticWorker:
    """Scores at once what a model would take seconds for, the same in every process."""

    def __init__(self, setup: Setup | None = None) -> None:
        costs = allocator().model.costs
        self.truth = synthetic.wrong_about(costs, seed=1)
        self.text = TEXT.windows.shape[0]
        self.difficulty = np.random.default_rng(2).lognormal(-0.125, 0.5, self.text)

    def score(self, texts: Sequence[str], name: str, tokens: int) -> list[dict[str, list[float]]]:
        """Per-window measures of candidates, as `search.worker.Worker.score` has them."""
        return [self._columns(Candidate.from_json(text), tokens) for text in texts]

    def _columns(self, candidate: Candidate, tokens: int) -> dict[str, list[float]]:
        count, length = TEXT.spread(tokens).windows.shape
        kl = float(CURVE.damage(synthetic.additive(allocator(), self.truth, candidate)))
        # What a window's KL differs by from the mean is the candidate's own, and less on more tokens.
        own = np.random.default_rng(int(candidate.key, 16)).normal(0, 0.1 * (256 / length) ** 0.5, self.text)
        windows = (kl * self.difficulty * np.exp(own))[:count]
        return {
            "kl": windows.tolist(),
            "nll": (2 + windows).tolist(),
            "top1": np.exp(-windows).tolist(),
        }

    def peak_memory(self) -> int:
        """Bytes; asked for by the stage's line, of no interest here."""
        return 0
