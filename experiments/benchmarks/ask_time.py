"""The sampler's own time per ask: `python -m experiments.benchmarks.ask_time [--json FILE]`.

A space of 300 decisions (a DeepSeek-V3-shaped model of more layers) with random costs, and a
study of 2,000 finished trials, three of four stopped early; the time of one ask,
its knapsack and its belief included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial

from compression.families import family
from compression.files import write_text
from search.allocator import Allocator
from search.costs import STREAMED, CostModel, Option, ranking_probes, type_probes
from search.options import REFERENCE_MODEL
from search.sampler import KnapsackSampler
from spaces.carry import Carry
from spaces.inventory import read_config
from spaces.quant_types import QUANT_TYPES
from spaces.space import Space

LAYERS = 21
TRIALS = 2_000


def problem(layers: int) -> Allocator:
    """An allocator of a deep model with random costs."""
    config = read_config(REFERENCE_MODEL) | {"num_hidden_layers": layers}
    inventory = family(config, "deep").inventory()
    rng = np.random.default_rng(0)
    orders = {
        c: {i: tuple(int(e) for e in rng.permutation(inventory.experts)) for i in inventory.moe_layers}
        for c in ("reap", "mass", "paper")
    }
    space = Space(inventory, orders)
    errors = {
        (t.name, q): 0.0 if q == "BF16" else 4.0 ** -QUANT_TYPES[q].bits_per_weight
        for t in inventory.quantizable
        for q in space.ladder(t)
    }
    measured: dict[Option, float] = {}
    for option, _ in [*ranking_probes(space, STREAMED), *type_probes(space, STREAMED)]:
        measured[option] = float(rng.lognormal(-5, 1)) * errors.get(option, 0.1)
    model = CostModel(space, measured, errors)
    carry = Carry(inventory, inventory)
    limit = int(1.5 / 16 * inventory.file_bytes(inventory.uniform_plan("BF16")))
    return Allocator(space, model, carry, limit)


def filled(allocator: Allocator, trials: int) -> optuna.Study:
    """A study of finished trials near the knapsack's optimum."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"])
    rng, space = np.random.default_rng(1), allocator.space
    for i in range(trials):
        costs = allocator.model.costs * rng.lognormal(0, 0.5, len(allocator.model.costs))
        params = allocator.draw(costs, space.forms[i % len(space.forms)])
        kl = float(allocator.model.predict(params) ** 1.1)
        scores = {"kl": kl, "kl_se": 0.0}
        rungs, complete = {"512": [kl] * 18}, i % 4 == 0
        attributes: dict[str, Any] = {
            "scores": scores,
            "rungs": rungs | ({"4608": [kl] * 18} if complete else {}),
        }
        outcome: dict[str, Any] = {"state": TrialState.PRUNED}
        if complete:
            outcome = {"state": TrialState.COMPLETE, "values": [kl, 1.0, 1.0]}
        study.add_trial(
            create_trial(params=params, distributions=space.distributions, user_attrs=attributes, **outcome)
        )
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--asks", type=int, default=24)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    allocator = problem(LAYERS)
    space = allocator.space
    study = filled(allocator, args.trials)
    study.sampler = KnapsackSampler(allocator)
    times = []
    for _ in range(args.asks):
        begun = time.process_time()
        study.ask(space.distributions)
        times.append(1000 * (time.process_time() - begun))
    row = {
        "decisions": len(space.inventory.quantizable) + 2 * len(space.inventory.moe_layers),
        "trials": args.trials,
        "first_ask_ms": round(times[0], 1),
        "median_ask_ms": round(float(np.median(times[1:])), 1),
        "slowest_ask_ms": round(max(times[1:]), 1),
    }
    print(row)
    if args.json:
        write_text(args.json, json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
