"""What a model's steps take: reading, filling, dequantizing, running and comparing, of its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from compression.passage import BATCH
from compression.variant_bank import HEADER_BYTES
from evaluators.texts import WINDOW, TextSet
from search.scale.rates import Rates
from search.stages import SEARCH_TOKENS
from spaces.inventory import Inventory
from spaces.space import Space

_STATES = 2**30  # bytes of states that a population holds, `evaluators.population`
_SOURCES = 9  # of the shipped search text
_KEPT = 0.75  # of the experts, in the candidates that are reckoned with


@dataclass(frozen=True)
class Work:
    """What a job takes.

    Attributes:
        seconds: CPU seconds of one thread of the core that rates were measured on.
        flop: Two for every weight that a token meets.
        read, written: Bytes of checkpoint and bank from and to the disk.
        fetched: Of the bytes read those that a node without the driver's disk has to be sent first.
        weights: Weights that are dequantized.
        traffic: Bytes between memory and CPU, of weights in float32.
    """

    seconds: float = 0.0
    flop: float = 0.0
    read: float = 0.0
    written: float = 0.0
    fetched: float = 0.0
    weights: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * a for a in vars(self).values()))


@dataclass(frozen=True)
class Model:
    """A model that is searched, as work sees it.

    Attributes:
        space: Its space.
        rates: Of a core.
        stream: Whether a layer at a time is held.
        checkpoint: Bytes of its files.
        kind: Of the checkpoint's numbers, a key of `Rates.filling`.
        candidate: Bytes of a candidate's file.
    """

    space: Space
    rates: Rates
    stream: bool
    checkpoint: int
    kind: str
    candidate: int

    @property
    def inventory(self) -> Inventory:
        return self.space.inventory

    @cached_property
    def weights(self) -> int:
        return self.inventory.parameters()

    @cached_property
    def matrix(self) -> int:
        """Weights of one expert's matrix."""
        stacks = [t for t in self.inventory.quantizable if t.per_expert]
        return max(t.parameters // t.shape[0] for t in stacks)

    @cached_property
    def experts(self) -> int:
        """Weights of all routed experts."""
        return sum(t.parameters for t in self.inventory.tensors if t.per_expert)

    @cached_property
    def active(self) -> float:
        """Weights of all blocks that a token meets."""
        share = self.inventory.top_k / self.inventory.experts
        return sum(
            t.parameters * (share if t.per_expert else 1)
            for t in self.inventory.tensors
            if t.layer is not None
        )

    @cached_property
    def dequantizing(self) -> float:
        """CPU seconds per weight, the mean over types."""
        types = sorted({t for tensor in self.inventory.quantizable for t in self.space.ladder(tensor)})
        return float(np.mean([self.rates.types[t]["dequantize"] for t in types]))

    @cached_property
    def choices(self) -> float:
        """Types that a weight may take, the mean over weights."""
        tensors = self.inventory.quantizable
        types = sum(len(self.space.ladder(t)) * t.parameters for t in tensors)
        return types / sum(t.parameters for t in tensors)

    def text(self, tokens: int, spread: bool) -> tuple[int, int]:
        """(windows, tokens of each) of a text of so many tokens; spread: a few of every kind of it."""
        return spread_over(tokens) if spread else (-(-tokens // WINDOW), WINDOW)

    def passes(self, windows: int, length: int, settings: int) -> int:
        """How often a population goes through the model, holding no more states than it may."""
        step = max(BATCH, _STATES // (8 * length * self.inventory.hidden * settings) // BATCH * BATCH)
        return -(-windows // step)

    def read(self, weights: float | None = None) -> Work:
        """Weights from the checkpoint into a model in float32; None: all."""
        count = self.weights if weights is None else weights
        size = self.checkpoint * count / self.weights
        return Work(count * self.rates.filling[self.kind], read=size, traffic=4 * count)

    def begin(self) -> Work:
        """What a pass over the uncompressed model takes before its first token."""
        return self.read() if self.stream else Work()

    def become(self) -> Work:
        """A candidate's weights out of the bank; in memory an expert that is pruned is written too."""
        kept = self.weights - (1 - _KEPT) * self.experts
        count = kept if self.stream else self.weights
        size = self.candidate * count / kept
        return Work(count * self.dequantizing, read=size, weights=count, traffic=4 * count)

    def first_use(self, before: int) -> Work:
        """Variants that a worker sees first in a candidate, after `before` others: hashed, sent to its node.

        Types are taken for drawn at random from their ladders, so that of L types a share (1 - 1/L)^before is
        new; a search that stays near its incumbent needs fewer.
        """
        kept = self.weights - (1 - _KEPT) * self.experts
        size = (1 - 1 / self.choices) ** before * self.candidate * self.weights / kept
        return Work(size / self.rates.hash, fetched=size)

    def run(self, windows: int, length: int, share: float = 1.0) -> Work:
        """Windows through a share of the blocks; every call reads the weights of the experts it uses."""
        tokens, used = min(BATCH, windows) * length, self.inventory.top_k / self.inventory.experts
        flop = 2 * self.active * windows * length * share
        met = self.active + (1 - (1 - used) ** tokens - used) * self.experts
        traffic = 4 * met * -(-windows // BATCH) * share
        return Work(flop / self.rates.flops(self.matrix, tokens * used), flop, traffic=traffic)

    def compare(self, tokens: int, settings: int = 1) -> Work:
        """Distributions of the base model and of settings, and how they differ."""
        size = tokens * self.inventory.vocabulary
        flop = 2 * size * self.inventory.hidden * (settings + 1)
        return Work(flop / self.rates.flops(self.matrix, 256) + settings * size * self.rates.logit, flop)

    def bank_bytes(self) -> int:
        """Bytes of all variants, with their headers."""
        tensors = self.inventory.quantizable
        return sum(t.bytes(kind) + HEADER_BYTES for t in tensors for kind in self.space.ladder(t))


def spread_over(tokens: int) -> tuple[int, int]:
    """(windows, tokens of each) that a search spreads a few tokens over."""
    count = SEARCH_TOKENS // WINDOW
    sources = tuple(str(i % _SOURCES) for i in range(count))
    whole = TextSet("search", np.zeros((count, WINDOW), np.int32), sources, 1.0)
    windows, length = whole.spread(tokens).windows.shape
    return windows, length
