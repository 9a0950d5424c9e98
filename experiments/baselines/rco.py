"""RCO: gradient descent on the logits of a choice per tensor, expected bytes held at the budget.

Source: Helcig and Alistarh, "Model Compression with Exact Budget Constraints via Riemannian Manifolds"
(arXiv 2605.00649), IST-DASLab/RCO. Logits alpha (tensors, types), pi = softmax(alpha). Each step averages
over Gumbel samples: noisy = (alpha + gumbel) / tau; the choice that maximises the sum of noisy logits
within the budget is run forwards, and the gradient goes back straight through softmax(noisy). The component
along the normal of {E[bytes] = budget} is taken off, Adam steps, a shift along the costs found by
bisection brings E[bytes] back to the budget, and Adam's first moment is projected onto the new tangent
space. tau falls from 1 to 0.05 geometrically; 4 samples a step. The result is the choice without noise.

Deviations, forced by the setting:
- A group is a GGUF tensor, an option its type. Where the unpruned model cannot fit, one expert count is
  fixed first (`evopress.pruned`).
- The published code has one cost vector for all groups and rounds it to whole numbers for its dynamic
  program. Here E[bytes] is of exact bytes per tensor and type, and the choice is an exact knapsack. The
  shift goes along bits per weight, alike for all tensors, so that the start (alpha = 0, shifted) treats
  tensors of all sizes alike; E[bytes] still falls monotonically along it.
- The weights between options are not run: dL/dpi comes from one backward pass at the sampled types, as
  its product with what each type would change (`evaluators.slopes`), the same up to a constant per tensor.
- A sample is one window of 256 tokens for the published 2,048 tokens, and there are as many steps as are
  paid for, for 200. `RATE` is the published 0.1 at 200 steps; with fewer, steps are larger in proportion
  up to `_MOST_RATE`. On the reference model at 200 GB and 60,000 tokens (11 steps) a rate of 0.1 ended at
  KL 0.34, 0.3 at 0.19, 0.5 to 1 at 0.14 to 0.17, 2 at 0.19.
- The choice without noise is scored at up to `CHECKPOINTS` steps on 2,048 tokens, and the best is kept;
  the published code returns the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluators.texts import WINDOW
from experiments.baselines.evopress import Genome, pruned
from experiments.baselines.lab import Lab
from experiments.baselines.method import room, sizes
from spaces.allocation import OptionClass, solve
from spaces.quant_types import QUANT_TYPES

SAMPLES = 4
CHECKPOINTS, CHECK_TOKENS = 6, 2048
RATE, STEPS, _MOST_RATE = 0.1, 200, 0.5
FIRST_TAU, LAST_TAU = 1.0, 0.05
_SAMPLE_COST = 4 * WINDOW  # two forward passes, and a backward one that counts as two


@dataclass(frozen=True)
class Manifold:
    """Logits whose expected bytes are `budget`.

    Attributes:
        bytes: (tensors, options) of each choice.
        shift: (tensors, options) the direction bytes are corrected along.
        there: (tensors, options) whether the option exists; logits of others are not read.
        budget: Bytes there are.
    """

    bytes: np.ndarray
    shift: np.ndarray
    there: np.ndarray
    budget: float

    @classmethod
    def of(cls, lab: Lab, genome: Genome) -> Manifold:
        """That of types at the genome's expert count."""
        kept, width = int(genome.fixed["kept"]), max(map(len, genome.options))
        shape = (len(genome.names), width)
        size, shift, there = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
        table = sizes(lab, kept)
        for g, (name, types) in enumerate(zip(genome.names, genome.options, strict=True)):
            size[g, : len(types)] = table[name]
            shift[g, : len(types)] = [QUANT_TYPES[t].bits_per_weight for t in types]
            there[g, : len(types)] = True
        return cls(size, shift, there, float(room(lab, kept)))

    def softmax(self, logits: np.ndarray) -> np.ndarray:
        """(tensors, options) probabilities, 0 where there is no option."""
        logits = np.where(self.there, logits, -np.inf)
        e = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    def expected(self, alpha: np.ndarray) -> float:
        """E[bytes]."""
        return float((self.softmax(alpha) * self.bytes).sum())

    def tangent(self, alpha: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """`vector` without its component along the gradient of E[bytes]."""
        pi = self.softmax(alpha)
        normal = pi * (self.bytes - (pi * self.bytes).sum(1, keepdims=True))
        return vector - (vector * normal).sum() / max(float((normal**2).sum()), 1e-30) * normal

    def retract(self, alpha: np.ndarray) -> np.ndarray:
        """`alpha` shifted so that E[bytes] is the budget, or as near as shifts bring it."""
        low, high = -1.0, 1.0  # bytes fall as the shift grows
        while self.expected(alpha - low * self.shift) < self.budget and low > -1e6:
            low *= 2
        while self.expected(alpha - high * self.shift) > self.budget and high < 1e6:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            over = self.expected(alpha - middle * self.shift) > self.budget
            low, high = (middle, high) if over else (low, middle)
        return np.asarray(alpha - high * self.shift)

    def choose(self, logits: np.ndarray) -> tuple[int, ...]:
        """The options of the largest sum of logits within the budget, by exact knapsack."""
        rows = zip(self.bytes.astype(np.int64), logits, self.there, strict=True)
        return solve([OptionClass(b[t], -x[t]) for b, x, t in rows], int(self.budget)).choice


@dataclass
class Adam:
    """Adam, its moments open to be projected."""

    rate: float
    first: np.ndarray
    second: np.ndarray
    step: int = 0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        """The move for a gradient."""
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        return np.asarray(-self.rate * mean / (np.sqrt(square) + 1e-8))


def _gradient(lab: Lab, genome: Genome, manifold: Manifold, alpha: np.ndarray, tau: float) -> np.ndarray:
    """Of KL by alpha, averaged over Gumbel samples."""
    out = np.zeros_like(alpha)
    for _ in range(SAMPLES):
        noisy = (alpha + lab.rng.gumbel(size=alpha.shape)) / tau
        soft = manifold.softmax(noisy)
        slopes = lab.slopes(genome.candidate(manifold.choose(noisy)), lab.draw(WINDOW))
        change = np.zeros_like(alpha)
        for g, (name, types) in enumerate(zip(genome.names, genome.options, strict=True)):
            change[g, : len(types)] = [slopes[name, t].first for t in types]
        out += soft * (change - (soft * change).sum(1, keepdims=True)) / tau / SAMPLES
    return out


def rco(lab: Lab) -> None:
    """RCO on types alone."""
    genome = pruned(lab)
    manifold = Manifold.of(lab, genome)
    steps = max(0, (lab.left - CHECKPOINTS * CHECK_TOKENS) // (SAMPLES * _SAMPLE_COST))
    checks = {round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    alpha = manifold.retract(np.zeros_like(manifold.bytes))
    adam = Adam(min(_MOST_RATE, RATE * STEPS / max(steps, 1)), np.zeros_like(alpha), np.zeros_like(alpha))
    best, known = np.inf, set[tuple[int, ...]]()
    lab.offer(genome.candidate(manifold.choose(alpha)))
    for step in range(steps):
        tau = FIRST_TAU * (LAST_TAU / FIRST_TAU) ** (step / max(steps - 1, 1))
        gradient = _gradient(lab, genome, manifold, alpha, tau)
        alpha = manifold.retract(alpha + adam(manifold.tangent(alpha, gradient)))
        adam.first = manifold.tangent(alpha, adam.first)
        choice = manifold.choose(alpha)
        if step + 1 in checks and choice not in known:
            known.add(choice)
            (kl,) = lab.mean([genome.candidate(choice)], CHECK_TOKENS)
            if kl < best:
                best = kl
                lab.offer(genome.candidate(choice))
