"""What every method of the benchmark gets: one model, one bank, one evaluator, one account of tokens.

A method is a function of a `Lab`. It scores candidates, which is paid in tokens of
forward pass, and offers its choice whenever that changes; the last offer is its
result. Nothing it can read tells it of the report text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from evaluators.sensitivity import alone
from evaluators.slopes import Option as Priced
from evaluators.slopes import Slope, Slopes
from evaluators.texts import WINDOW, TextSet
from search.allocator import Allocator
from search.cache_files import bank_index
from search.costs import CostModel, Option
from search.options import REFERENCE_MODEL, REFERENCE_NAME, SHIPPED_TEXTS
from search.pool import LocalPool
from search.stages import calibrate, keep_texts, prepare_texts, quantize
from search.worker import Setup, Worker
from spaces.candidate import Candidate
from spaces.carry import Carry
from spaces.inventory import Inventory
from spaces.space import Space

TARGET_PARAMETERS = 671_026_419_200
"""Of DeepSeek-V3 (its inventory says so): budgets are spoken of as its bits per weight."""


def setup(cache: Path) -> Setup:
    """Workers of the reference model; without a tokenizer in the file, which would take room of the small."""
    return Setup(str(REFERENCE_MODEL), REFERENCE_NAME, str(cache), exportable=False, cache_bytes=3 * 2**29)


def prepare(cache: Path, report: Callable[[str], None] = lambda stage: None) -> None:
    """Calibrates and quantizes the reference model once; goes on where it was stopped."""
    from compression.checkpoint import load_tokenizer

    cache.mkdir(parents=True, exist_ok=True)
    keep_texts(cache, prepare_texts(load_tokenizer(REFERENCE_MODEL), SHIPPED_TEXTS, None, None), {})
    pool = LocalPool(setup(cache))
    report("calibration")
    calibrate(pool, cache, lambda done, total: None)
    report("quantization")
    quantize(pool, pool.worker.space, cache, lambda done, total: None)


@dataclass
class Offer:
    """A method's choice from some point on: tokens spent by then, and the candidate."""

    tokens: int
    candidate: Candidate


@dataclass
class Lab:
    """One method's run at one budget.

    Attributes:
        cache: What `prepare` made.
        gigabytes: Budget for DeepSeek-V3; the reference model's has the same bits per weight.
        seed: Of whatever the method draws.
        tokens: Tokens of forward pass it may spend.
        worker: Shared between labs to save loading.
        scratch: Folder for what a method may keep between runs.
        spent: Tokens spent. A candidate on n tokens costs n, alone or in company; a backward pass twice that.
        offers: In the order they were made.
    """

    cache: Path
    gigabytes: float
    seed: int
    tokens: int
    worker: Worker
    scratch: Path = Path("unused")
    spent: int = 0
    offers: list[Offer] = field(default_factory=list)

    @staticmethod
    def open(cache: Path) -> Worker:
        """A worker with the bank at hand."""
        worker = Worker(setup(cache))
        worker.register([(n, t, key) for (n, t), (key, _) in bank_index(cache).items()])
        return worker

    @property
    def space(self) -> Space:
        space: Space = self.worker.space
        return space

    @property
    def inventory(self) -> Inventory:
        return self.space.inventory

    @cached_property
    def limit(self) -> int:
        """Bytes the file may take."""
        return int(self.gigabytes * 1e9 / TARGET_PARAMETERS * self.inventory.parameters())

    @cached_property
    def errors(self) -> dict[tuple[str, str], float]:
        """(tensor, type) to sum(h * (w - q)^2) / sum(h * w^2), h the imatrix."""
        return {name: error for name, (_, error) in bank_index(self.cache).items()}

    @property
    def left(self) -> int:
        return self.tokens - self.spent

    @cached_property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def size(self, candidate: Candidate) -> int:
        """Bytes of the candidate's file."""
        return self.inventory.file_bytes(candidate.plan)

    def fits(self, candidate: Candidate) -> bool:
        return self.size(candidate) <= self.limit

    def allocator(self, model: CostModel) -> Allocator:
        """The exact knapsack at this budget for a model of costs."""
        return Allocator(self.space, model, Carry(self.inventory, self.inventory), self.limit)

    @cached_property
    def text(self) -> TextSet:
        """All search windows."""
        text: TextSet = self.worker._text("search", 10**9)
        return text

    def _some(self, windows: Sequence[int]) -> tuple[TextSet, np.ndarray]:
        chosen = np.asarray(windows)
        text = TextSet("search", self.text.windows[chosen], ("",) * len(chosen), self.text.bytes_per_token)
        return text, self.worker._states("search")[chosen]

    def draw(self, tokens: int) -> list[int]:
        """Fresh random search windows that hold `tokens` tokens (at least one window)."""
        count = min(len(self.text.windows), max(1, tokens // WINDOW))
        return sorted(int(i) for i in self.rng.choice(len(self.text.windows), count, replace=False))

    def score(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[np.ndarray]:
        """KL of each candidate on each of some search windows, nats; costs their tokens."""
        text, states = self._some(windows)
        self.spent += len(candidates) * text.windows.size
        settings = [self.worker.settings.of(c) for c in candidates]
        return [d.kl for d in self.worker.population.measure(settings, text, states)]

    def mean(self, candidates: Sequence[Candidate], tokens: int) -> list[float]:
        """Mean KL of each candidate on the first `tokens` search tokens."""
        return [float(kl.mean()) for kl in self.score(candidates, range(max(1, tokens // WINDOW)))]

    def costs(self, options: Sequence[Option], tokens: int) -> dict[Option, float]:
        """KL of each option alone on the first search tokens; costs as much as scoring each."""
        text, states = self._some(range(max(1, tokens // WINDOW)))
        self.spent += len(options) * text.windows.size
        settings = [alone(self.worker.settings, self.space, *option) for option in options]
        found = self.worker.population.measure(settings, text, states)
        return {option: d.mean_kl for option, d in zip(options, found, strict=True)}

    def slopes(
        self, candidate: Candidate | None, windows: Sequence[int], probes: int = 0, seed: int = 0
    ) -> Mapping[Priced, Slope]:
        """What each type of each tensor would change at a candidate (None: uncompressed), by gradients."""
        text, states = self._some(windows)
        slopes = Slopes(self.worker.model, self.space)
        self.spent += slopes.tokens(text, probes, base=candidate is None)
        setting = self.worker.settings.base if candidate is None else self.worker.settings.of(candidate)
        return slopes.at(setting, text, states, probes, seed)

    def offer(self, candidate: Candidate) -> None:
        """Makes `candidate` the method's choice.

        Raises:
            ValueError: It does not fit: no method may return what is over the budget.
        """
        candidate.validate(self.inventory)
        if not self.fits(candidate):
            raise ValueError(f"{self.size(candidate)} bytes are over the limit of {self.limit}")
        if not self.offers or self.offers[-1].candidate != candidate:
            self.offers.append(Offer(self.spent, candidate))

    def counts_that_fit(self) -> list[int]:
        """Expert counts (alike in all layers) of which some config fits, fewest first."""
        out = []
        for kept in self.space.kept_options:
            types = {t.name: min(self.space.ladder(t), key=t.bytes) for t in self.inventory.quantizable}
            if self.fits(self.space.candidate(self.space.params(types, kept, self.space.criteria[0]))):
                out.append(kept)
        return out
