"""Hypervolume of (KL, bytes, tokens/s): `python -m experiments.benchmarks.hypervolume OUT [--json FILE]`.

This project's sampler after 64 trials against every Optuna sampler after 256, same space, bank,
budget and 1,024 search tokens for every trial; OUT is a folder of `experiments.benchmarks.search`.
The volume is over a reference point: KL of `WORST_KL`, the limit's bytes, no tokens per second;
each axis is divided by its length, so that 1 would be a model without damage, bytes or time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from compression.files import write_text
from experiments.baselines.lab import Lab, prepare
from experiments.baselines.moefit import laboratory
from search.runner import TrialRunner
from search.sampler import make_sampler
from search.study import finished

BUDGET = 140
OURS, THEIRS = 64, 256
WORST_KL = 3.0
SAMPLERS = ("random", "tpe", "nsgaii")


def hypervolume(points: np.ndarray) -> float:
    """Volume between points and the corner (1, 1, 1) that some point dominates.

    Args:
        points: (n, 3), every objective minimised; what is beyond the corner counts for nothing.
    """
    inside = points[(points < 1).all(1)]
    total = 0.0
    levels = np.unique(inside[:, 2])
    for level, above in zip(levels, [*levels[1:], 1.0], strict=True):
        layer = inside[inside[:, 2] <= level][:, :2]
        area, height = 0.0, 1.0
        for x, y in layer[np.lexsort((layer[:, 1], layer[:, 0]))]:
            if y < height:
                area += (1 - x) * (height - y)
                height = y
        total += area * (above - level)
    return float(total)


def points(study: optuna.Study, limit: int, fastest: float) -> np.ndarray:
    """(trials, 3): KL, bytes and time per token, each over its reference."""
    rows = [t.user_attrs["scores"] for t in sorted(finished(study), key=lambda t: t.number)]
    return np.array(
        [[s["kl"] / WORST_KL, s["target_bytes"] / limit, 1 - s["tokens_per_second"] / fastest] for s in rows]
    )


def fill(runner: TrialRunner, trials: int) -> optuna.Study:
    """Runs trials, none stopped early."""
    runner.run(trials)
    return runner.study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    prepare(args.out / "cache")
    worker = Lab.open(args.out / "cache")
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        studies: dict[str, Any] = {}
        for name in ("moefit", *SAMPLERS):
            lab = Lab(args.out / "cache", BUDGET, seed, 10**9, worker, scratch=args.out / "scratch")
            study, runner = laboratory(lab, lab.space)
            runner.rungs = (1024,)
            runner.slopes = name == "moefit"
            # With all its arms: the benchmark's laboratory looks for the lowest KL alone.
            study.sampler = make_sampler("knapsack" if runner.slopes else name, runner.allocator, seed)
            studies[name] = (fill(runner, OURS if name == "moefit" else THEIRS), lab.limit)
        rows += measured(studies, seed)
        for row in rows[-len(studies) :]:
            print(row, flush=True)
        if args.json:
            write_text(args.json, json.dumps(rows, indent=1) + "\n")


def measured(studies: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """A row per sampler, all over the same fastest candidate."""
    every = [t.user_attrs["scores"]["tokens_per_second"] for s, _ in studies.values() for t in finished(s)]
    fastest = max(every)
    rows = []
    for name, (study, limit) in studies.items():
        found = points(study, limit, fastest)
        counts: Sequence[int] = (OURS,) if name == "moefit" else (OURS, THEIRS)
        volumes = {f"after_{n}": round(hypervolume(found[:n]), 5) for n in counts}
        rows.append({"sampler": name, "seed": seed, **volumes})
    return rows


if __name__ == "__main__":
    main()
