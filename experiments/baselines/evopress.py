"""EvoPress: evolution of bit widths by level switches, and the same with more levers.

Source: Sieberling et al., "EvoPress" (arXiv 2410.14649), `evo_quant_search.py` of IST-DASLab/EvoPress,
and its GGUF variant in gptq-gguf-toolkit. One parent. Starts are a uniform type rounded up, lowered one
random level at a time until they fit; the best becomes the parent. A child takes min(U{1..3}, U{1..3})
random levels up, then random levels down until it fits (group rule "none", for tensors of differing
sizes); children with over 10 changes, less than 0.8 of their lost bytes gained, or a twin are drawn again.
Survivors are chosen by KL in stages, each on fresh windows that all share; the parent joins the last.

Deviations, forced by the setting:
- A gene is a GGUF tensor, so all experts of a layer and role share a type; levels are GGUF types.
- The file's exact bytes count, not mean bits of linears. In the published code a whole-number target may
  start (and, being elitist, end) over budget; our fix: no parent and no child is over it.
- 16 children, 4, 2 and 1 survivors on 256, 1,024 and 4,096 tokens, for the published 128; 16, 4, 1 on
  2,048, 16,384, 131,072; 16 starts on 256 tokens. A window is 256 tokens. Tokens end it, not generations.
- It cannot prune: where the unpruned model cannot fit, `pruned` fixes one expert count beforehand.

`evopress_joint` is this project's extension, not the authors': genes also for experts kept, top-k and
ranking, per layer where the runtime allows. Top-k and ranking change no bytes: switching them up or down
one level counts as a flip, and only genes that change bytes are lowered to make a child fit. Its starts
begin at a uniform type drawn from those that the fewest experts can carry, nothing pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluators.texts import WINDOW
from experiments.baselines.lab import Lab
from experiments.baselines.method import Unreachable, fitting_counts
from experiments.baselines.simple import largest_uniform
from spaces.candidate import Candidate
from spaces.quant_types import LADDER
from spaces.space import RAGGED

Point = tuple[int, ...]
"""One level per gene."""

STARTS, START_TOKENS = 16, 256
CHILDREN, SURVIVORS, TOKENS = 16, (4, 2, 1), (256, 1024, 4096)
_MOST_CHANGES, _LEAST_RETURN = 10, 0.8
_ATTEMPTS = 800  # draws per generation; a parent near the smallest config has few neighbours


class Genome:
    """Which parameters of the space are genes; the rest are `fixed`.

    Attributes:
        names, options: Of every gene, options fewest bytes first.
        free: Whether a gene changes no bytes.
    """

    def __init__(self, lab: Lab, fixed: Mapping[str, Any]) -> None:
        self.lab, self.fixed = lab, dict(fixed)
        genes = {n: d for n, d in lab.space.distributions.items() if n not in fixed}
        self.names = tuple(genes)
        self.options = [tuple(d.choices) for d in genes.values()]  # type: ignore[attr-defined]
        self.free = [n.endswith(("top_k", "criterion")) for n in self.names]

    def candidate(self, point: Sequence[int]) -> Candidate:
        values = {n: o[i] for n, o, i in zip(self.names, self.options, point, strict=True)}
        return self.lab.space.candidate(self.fixed | values)

    def size(self, point: Sequence[int]) -> int:
        """Bytes of the file."""
        return self.lab.size(self.candidate(point))

    def uniforms(self) -> list[tuple[int, Point]]:
        """(bytes, point) of all uniform types, fewest bytes first; most experts and largest top-k."""
        rows = []
        for name, options in zip(self.names, self.options, strict=True):
            tensor = self.lab.inventory.by_name.get(name)
            most = 0 if name.endswith("criterion") else len(options) - 1
            kinds = (self.lab.space.nearest(tensor, k) if tensor else options[most] for k in LADDER)
            rows.append([options.index(k) for k in kinds])
        return sorted((self.size(p), p) for p in set(zip(*rows, strict=True)))

    def lowered(self, point: Sequence[int], rng: np.random.Generator, most: int | None = None) -> Point:
        """`point`, random levels taken down until it fits.

        Raises:
            Unreachable: It does not within `most` steps, or at all.
        """
        levels, steps = list(point), 0
        while self.size(levels) > self.lab.limit:
            able = [g for g, level in enumerate(levels) if level and not self.free[g]]
            if steps == most or not able:
                raise Unreachable(f"over {self.lab.limit:,} bytes after {steps} steps down")
            levels[rng.choice(able)] -= 1
            steps += 1
        return tuple(levels)

    def child(self, parent: Point, rng: np.random.Generator) -> Point | None:
        """A mutated parent that fits, or None where the draw is one to discard."""
        flips = int(min(rng.integers(1, 4), rng.integers(1, 4)))
        levels, tops = list(parent), [len(options) - 1 for options in self.options]
        for _ in range(flips):
            able = [g for g, top in enumerate(tops) if top and (self.free[g] or levels[g] < top)]
            if not able:
                return None
            gene = rng.choice(able)
            down = self.free[gene] and levels[gene] and (levels[gene] == tops[gene] or rng.random() < 0.5)
            levels[gene] += -1 if down else 1
        try:
            out = self.lowered(levels, rng, _MOST_CHANGES - flips)
        except Unreachable:
            return None
        raised = self.size(levels)
        added, removed = raised - self.size(parent), raised - self.size(out)
        return None if removed and added / removed < _LEAST_RETURN else out


def pruned(lab: Lab, tokens: int = 1024) -> Genome:
    """A gene per tensor, for methods that cannot prune: unpruned if that fits, else the best count by REAP.

    Every count that fits is tried at the largest uniform type it allows; on fewer tokens where the lab's
    do not pay for `tokens` each. Without a trial the largest count is taken.

    Raises:
        Unreachable: No count fits.
    """
    types, counts = {t.name: lab.space.ladder(t)[0] for t in lab.inventory.quantizable}, fitting_counts(lab)
    fixed = [lab.space.params(types, kept, "reap") for kept in counts]
    genomes = [Genome(lab, {n: v for n, v in params.items() if n not in types}) for params in fixed]
    tokens = min(tokens, lab.left // len(counts) // WINDOW * WINDOW)
    if counts[-1] == lab.inventory.experts or not tokens:
        return genomes[-1]
    zero = [0] * len(genomes[0].names)
    tried = [largest_uniform(lab, n) or g.candidate(zero) for n, g in zip(counts, genomes, strict=True)]
    return genomes[int(np.argmin(lab.mean(tried, tokens)))]


def brood(genome: Genome, parent: Point, rng: np.random.Generator) -> list[Point]:
    """Distinct children, none of them the parent; fewer than `CHILDREN` where few are found."""
    out: dict[Point, None] = {}
    for _ in range(_ATTEMPTS):
        child = genome.child(parent, rng)
        if child is not None and child != parent:
            out[child] = None
        if len(out) == CHILDREN:
            break
    return list(out)


def _select(lab: Lab, genome: Genome, points: list[Point], survivors: int, tokens: int) -> list[Point]:
    """The best few on fresh windows, best first."""
    scores = lab.score([genome.candidate(p) for p in points], lab.draw(tokens))
    order = np.argsort([float(s.mean()) for s in scores], kind="stable")
    return [points[i] for i in order[:survivors]]


def _evolve(lab: Lab, genome: Genome, starts: list[Point]) -> None:
    starts, parent = list(dict.fromkeys(starts)), starts[0]
    if lab.left >= len(starts) * START_TOKENS:
        (parent,) = _select(lab, genome, starts, 1, START_TOKENS)
    lab.offer(genome.candidate(parent))
    while points := brood(genome, parent, lab.rng):
        entering = [min(n, len(points)) for n in (CHILDREN, *SURVIVORS[:-1])]
        if lab.left < sum(n * t for n, t in zip(entering, TOKENS, strict=True)) + TOKENS[-1]:
            return
        for survivors, tokens in zip(SURVIVORS, TOKENS, strict=True):
            points = [*points, parent] if survivors == SURVIVORS[-1] else points
            points = _select(lab, genome, points, survivors, tokens)
        parent = points[0]
        lab.offer(genome.candidate(parent))


def evopress(lab: Lab) -> None:
    """EvoPress on types alone."""
    genome = pruned(lab)
    uniforms = genome.uniforms()
    start = next((point for size, point in uniforms if size > lab.limit), uniforms[-1][1])
    _evolve(lab, genome, [genome.lowered(start, lab.rng) for _ in range(STARTS)])


def evopress_joint(lab: Lab) -> None:
    """Its moves on types, expert counts, top-k and rankings together; an extension of this project."""
    fixed: dict[str, Any] = {"form": lab.space.forms[-1]}
    if RAGGED in lab.space.forms:  # such a candidate does not read the counts of a portable one
        fixed |= {"kept": lab.inventory.experts, "top_k": lab.inventory.top_k}
    genome = Genome(lab, fixed)
    bare = [int(name in lab.inventory.by_name) for name in genome.names]
    starts = [p for _, p in genome.uniforms() if genome.size(np.multiply(p, bare).tolist()) <= lab.limit]
    if not starts:
        raise Unreachable(f"nothing fits {lab.limit:,} bytes")
    picks = lab.rng.integers(len(starts), size=STARTS)
    _evolve(lab, genome, [genome.lowered(starts[i], lab.rng) for i in picks])
