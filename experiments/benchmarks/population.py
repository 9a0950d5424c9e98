"""What evaluating together saves: `python -m experiments.benchmarks.population OUT [--json FILE]`.

OUT is a folder of `experiments.benchmarks.search` (its cache is used, or made). Rounds of the
sampler's own proposals are scored one candidate at a time and together, and so are the
one-at-a-time options of the cost stage; both ways in one run, and their scores compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.setting import Setting
from evaluators.population import Population
from evaluators.sensitivity import alone
from experiments.baselines.lab import Lab, prepare
from experiments.baselines.moefit import laboratory
from experiments.figures import figures
from search.costs import FULL, ranking_probes, type_probes
from search.worker import Worker

ROUNDS = (1, 4, 16, 64)
TOKENS = 1024
BUDGET = 103


def compare(worker: Worker, settings: Sequence[Setting], tokens: int) -> dict[str, Any]:
    """Seconds and work of both ways, and the largest difference of any window's KL."""
    text, states = worker._text("search", tokens), worker._states("search")
    together, apart = Population(worker.model), Population(worker.model)
    begun = time.perf_counter()
    first = together.measure(settings, text, states)
    middle = time.perf_counter()
    second = [apart.measure([s], text, states)[0] for s in settings]
    ended = time.perf_counter()
    layers = worker.inventory.layers
    differences = [float(np.abs(a.kl - b.kl).max()) for a, b in zip(first, second, strict=True)]
    return {
        "candidates": len(settings),
        "seconds_together": round(middle - begun, 3),
        "seconds_apart": round(ended - middle, 3),
        "speed_up": round((ended - middle) / (middle - begun), 3),
        "block_passes_saved": round(1 - together.work.block_tokens / (apart.work.tokens * layers), 4),
        "largest_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    prepare(args.out / "cache")
    worker = Lab.open(args.out / "cache")
    lab = Lab(args.out / "cache", BUDGET, 0, 10**9, worker, scratch=args.out / "scratch")
    study, runner = laboratory(lab)
    runner.step(2)
    asked = [study.ask(runner.allocator.space.distributions) for _ in range(max(ROUNDS))]
    proposals = [worker.settings.of(runner.allocator.space.candidate(t.params)) for t in asked]
    rows = {f"round of {n}": compare(worker, proposals[:n], TOKENS) for n in ROUNDS}
    probes = [o for o, _ in [*ranking_probes(lab.space, FULL), *type_probes(lab.space, FULL)]]
    options = [alone(worker.settings, lab.space, *o) for o in probes]
    rows["one-at-a-time costs"] = compare(worker, options, TOKENS)
    figures(rows, args.json)


if __name__ == "__main__":
    main()
