"""AMQ: NSGA-II on a radial basis predictor that is refitted to every batch of true scores.

Source: Lee et al., "AMQ" (arXiv 2509.12019), `amq/search/optimizer.py` of dlwns147/amq. An archive of truly
scored configs begins with uniform types and random mixes. Each iteration fits a cubic radial basis function
with a linear tail to all of it, runs NSGA-II on (predicted KL, bytes) from the archive's non-dominated set
(population 200, 20 generations, binomial crossover 0.9, integer mutation 0.1, binary tournaments), and scores
those configs of the last population that even out the gaps between bytes along the front. How well the
predictor ranked them beforehand (Spearman, Kendall) is kept per iteration.

Deviations, forced by the setting:
- A gene is a GGUF tensor (bits per weight, scaled to 0..1); exact bytes of the file are the second objective,
  KL the first (there Jensen-Shannon). Where unpruned cannot fit, `evopress.pruned` fixes the expert count.
- One budget is asked for, not a front: the published constraint on the range of bits here keeps bytes
  within the last `NEAR` of the limit, and random mixes are lowered until they fit. Its result is the best
  of the archive. No tensor is frozen at the highest bits beforehand: low budgets do not hold them.
- 2,048 tokens per true score. The first archive is 1.1 times what the linear tail needs (as the published
  250 for 224 genes) but at most half of what is paid for; then 8 scores per iteration, for 50.
- With fewer points than the linear tail needs, or a singular system, the basis is linear, the tail constant.
- Integer mutation redraws each gene with probability 0.1 (the published code redraws one whole config in
  ten); the evenest subset is picked greedily, not by another genetic algorithm; the predictor's ranks are
  of unseen configs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.stats import kendalltau, spearmanr

from experiments.baselines.evopress import Point, pruned
from experiments.baselines.lab import Lab
from experiments.baselines.method import room, sizes
from spaces.quant_types import QUANT_TYPES

TOKENS = 2048
PER_ITERATION = 8
NEAR = 0.05
POPULATION, GENERATIONS, CROSSOVER, MUTATION = 200, 20, 0.9, 0.1
_SMOOTHING = 1e-3

Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(n, genes) levels to (n, 2) objectives and (n,) constraint violations."""


def fit_predictor(features: np.ndarray, kl: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Interpolates (n, genes) features in 0..1, no two alike, to (n,) KL; takes others to theirs."""
    # A gene that never changed makes the linear tail singular.
    varies = (np.ptp(features, axis=0) > 0) | (len(features) == 1)
    x = features[:, varies]
    try:
        model = RBFInterpolator(x, kl, kernel="cubic", degree=1)
    except (ValueError, np.linalg.LinAlgError):  # too few points; dependent genes
        model = RBFInterpolator(x, kl, kernel="linear", degree=0, smoothing=_SMOOTHING)
    return lambda points: model(points[:, varies])


def fronts(objectives: np.ndarray, violation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) rank and crowding distance of (n, 2) objectives, both least; less violation dominates first."""
    a, b, over = objectives[:, None], objectives[None], np.maximum(violation, 0)
    dominates = (over[:, None] == over) & (a <= b).all(2) & (a < b).any(2) | (over[:, None] < over)
    rank, crowding = np.full(len(objectives), -1), np.zeros(len(objectives))
    while (rank < 0).any():
        left = rank < 0
        front = np.flatnonzero(left & ~(dominates & left[:, None]).any(0))
        rank[front] = rank.max() + 1
        for column in objectives[front].T:
            order = np.argsort(column, kind="stable")
            span = max(float(np.ptp(column)), 1e-12)
            crowding[front[order[1:-1]]] += (column[order[2:]] - column[order[:-2]]) / span
            crowding[front[order[[0, -1]]]] = np.inf
    return rank, crowding


def nsga2(evaluate: Evaluate, start: np.ndarray, levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The last population, (at most 200, genes), from `start` (m, genes); gene g has `levels[g]` options."""
    population = start[:POPULATION]
    rank, crowding = fronts(*evaluate(population))
    for _ in range(GENERATIONS):
        a, b = rng.integers(len(population), size=(2, 2, POPULATION))  # rivals: (parent, child)
        better = (rank[a] < rank[b]) | ((rank[a] == rank[b]) & (crowding[a] >= crowding[b]))
        mother, father = population[np.where(better, a, b)]
        mixed = rng.random(mother.shape) < 0.5 * (rng.random((POPULATION, 1)) < CROSSOVER)
        children = np.where(mixed, father, mother)
        mutated = rng.random(children.shape) < MUTATION
        children = np.where(mutated, rng.integers(levels, size=children.shape), children)
        population = np.unique(np.concatenate([population, children]), axis=0)
        rank, crowding = fronts(*evaluate(population))
        keep = np.lexsort((-crowding, rank))[:POPULATION]
        population, rank, crowding = population[keep], rank[keep], crowding[keep]
    return population


def spread(sizes: np.ndarray, known: np.ndarray, count: int) -> list[int]:
    """Picks `count` of (n,) sizes, one at a time, so that gaps to `known` and each other vary least."""
    picked: list[int] = []
    for _ in range(min(count, len(sizes))):
        left = [i for i in range(len(sizes)) if i not in picked]
        merged = [np.sort([*known, *sizes[picked], sizes[i]]) for i in left]
        picked.append(left[int(np.argmin([np.diff(m).std() for m in merged]))])
    return picked


def _lookup(table: list[np.ndarray], points: np.ndarray) -> np.ndarray:
    """(n, genes) entries of a row per gene at (n, genes) levels."""
    return np.stack([row[points[:, g]] for g, row in enumerate(table)], axis=1)


@dataclass
class Amq:
    """One run.

    Attributes:
        lab: Pays for it.
        archive: Point to KL, in the order they were scored.
        agreement: Spearman and Kendall of the predictor on each batch before it was scored.
    """

    lab: Lab
    archive: dict[Point, float] = field(default_factory=dict)
    agreement: list[tuple[float, float]] = field(default_factory=list)

    def run(self) -> None:
        lab = self.lab
        self.genome = genome = pruned(lab)
        kept = int(genome.fixed["kept"])
        self.sizes, self.room = [sizes(lab, kept)[name] for name in genome.names], room(lab, kept)
        bits = [np.array([QUANT_TYPES[t].bits_per_weight for t in types]) for types in genome.options]
        self.features = [(b - b[0]) / max(b[-1] - b[0], 1.0) for b in bits]
        paid = lab.left // TOKENS
        count = min(round(1.1 * (len(bits) + 1)), max(1, paid // 2))
        uniform = [p for size, p in reversed(genome.uniforms()) if size <= lab.limit][: max(1, count // 4)]
        self._score([*uniform, *self._mixes(count - len(uniform), uniform)])
        while lab.left >= TOKENS:
            points, predicted = self._next()
            if not points:
                return
            points = points[: lab.left // TOKENS]
            self._score(points)
            if len(points) > 1:
                pair = predicted[: len(points)], [self.archive[p] for p in points]
                self.agreement.append((float(spearmanr(*pair).statistic), float(kendalltau(*pair).statistic)))

    def _mixes(self, count: int, known: list[Point]) -> list[Point]:
        """Up to `count` random mixes of types, random levels lowered until they fit, not among `known`."""
        rng, out = self.lab.rng, list[Point]()
        for _ in range(20 * count):
            weights = rng.random(max(map(len, self.sizes)))  # a preference per level, as published
            chances = [weights[: len(s)] / weights[: len(s)].sum() for s in self.sizes]
            levels = np.array([rng.choice(len(p), p=p) for p in chances])
            size = int(_lookup(self.sizes, levels[None]).sum())
            while size > self.room:
                gene = rng.choice(np.flatnonzero(levels))
                size -= int(self.sizes[gene][levels[gene]] - self.sizes[gene][levels[gene] - 1])
                levels[gene] -= 1
            point = tuple(levels.tolist())
            out += [point] if point not in known and point not in out else []
            if len(out) == count:
                break
        return out

    def _score(self, points: list[Point]) -> None:
        """Scores what is paid for, and offers the best of the archive."""
        points = points[: self.lab.left // TOKENS]
        if points:
            kl = self.lab.mean([self.genome.candidate(p) for p in points], TOKENS)
            self.archive.update(zip(points, kl, strict=True))
        best = min(self.archive, key=self.archive.__getitem__) if self.archive else (0,) * len(self.sizes)
        self.lab.offer(self.genome.candidate(best))

    def _next(self) -> tuple[list[Point], np.ndarray]:
        """The configs to score next, and their predicted KL."""
        known, kl = np.array(list(self.archive)), np.array(list(self.archive.values()))
        predict = fit_predictor(_lookup(self.features, known), kl)

        def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            size = _lookup(self.sizes, points).sum(1)
            outside = np.maximum(size / self.room - 1, 1 - NEAR - size / self.room)
            return np.column_stack([predict(_lookup(self.features, points)), size]), outside

        known_size = _lookup(self.sizes, known).sum(1)
        front = known[fronts(np.column_stack([kl, known_size]), np.zeros(len(kl)))[0] == 0]
        population = nsga2(evaluate, front, np.array([len(o) for o in self.genome.options]), self.lab.rng)
        points = [tuple(p) for p in population[evaluate(population)[1] <= 0].tolist()]
        points = [p for p in points if p not in self.archive]
        points = points or self._mixes(PER_ITERATION, list(self.archive))
        if not points:
            return [], np.empty(0)
        objectives, _ = evaluate(np.array(points))
        picked = spread(objectives[:, 1], known_size, PER_ITERATION)
        return [points[i] for i in picked], objectives[picked, 0]


def amq(lab: Lab) -> None:
    """AMQ on types alone."""
    Amq(lab).run()
