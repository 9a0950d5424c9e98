"""How true costs on few tokens are: `python -m experiments.cost_accuracy OUT [--json FILE]`.

One-at-a-time costs on the first whole windows and spread over many (`TextSet.spread`), and the gradients'
estimates, against costs on windows from all over the search text; for each group of options the median
ratio and the spread (standard deviation) of its logarithm. OUT is a folder of
`experiments.benchmarks.search`, whose cache is used, or made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.sensitivity import alone
from evaluators.slopes import Slopes
from evaluators.texts import TextSet
from experiments.baselines.lab import Lab, prepare
from experiments.figures import figures
from search.costs import Option

TRUE_WINDOWS = 24
TOKENS = (256, 512, 1024, 2048)
_GRADIENT_TOKENS, _PROBES = 512, 1


def options(lab: Lab) -> dict[str, list[Option]]:
    """Some options of every group."""
    space, inventory = lab.space, lab.inventory
    layers = inventory.moe_layers
    counts = [n for n in space.kept_options[:-1] if n % 2 == 0]
    return {
        "expert counts": [(f"blk.{i}.experts", (n, space.criteria[-1])) for i in layers for n in counts],
        "top-k": [(f"blk.{i}.top_k", k) for i in layers for k in space.top_k_options[:-1]],
        "types of experts": [
            (t.name, q) for t in inventory.quantizable if t.per_expert for q in space.ladder(t)[::4]
        ],
        "other types": [
            (t.name, q) for t in inventory.quantizable if not t.per_expert for q in space.ladder(t)[::8]
        ],
    }


def measured(
    lab: Lab, groups: Mapping[str, list[Option]], text: TextSet, states: np.ndarray
) -> dict[Option, float]:
    """KL of every option alone."""
    flat = [o for some in groups.values() for o in some]
    settings = [alone(lab.worker.settings, lab.space, *o) for o in flat]
    found = lab.worker.population.measure(settings, text, states[:, : text.windows.shape[1]])
    return {o: d.mean_kl for o, d in zip(flat, found, strict=True)}


def accuracy(
    groups: Mapping[str, list[Option]], costs: Mapping[Any, float], true: Mapping[Option, float]
) -> dict[str, Any]:
    """Group to median of true over cost, and the spread of its logarithm."""
    out = {}
    for name, some in groups.items():
        logs = [np.log(max(true[o], 1e-9) / max(costs[o], 1e-9)) for o in some if o in costs]
        if logs:
            out[name] = {
                "ratio": round(float(np.exp(np.median(logs))), 3),
                "spread": round(float(np.std(logs)), 3),
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    prepare(args.out / "cache")
    lab = Lab(args.out / "cache", 103, 0, 10**9, Lab.open(args.out / "cache"))
    whole, states, groups = lab.text, lab.worker._states("search"), options(lab)
    last = TextSet(
        "search", whole.windows[-TRUE_WINDOWS:], whole.sources[-TRUE_WINDOWS:], whole.bytes_per_token
    )
    true = measured(lab, groups, last, states[len(whole.windows) - TRUE_WINDOWS :])
    rows = {}
    for tokens in TOKENS:
        for name, text in (("first windows", whole.head(tokens)), ("spread", whole.spread(tokens))):
            rows[f"{name}, {tokens}"] = accuracy(groups, measured(lab, groups, text, states), true)
    few = whole.spread(_GRADIENT_TOKENS)
    routing = [*groups["expert counts"], *groups["top-k"]]
    found = Slopes(lab.worker.model, lab.space).at(
        lab.worker.settings.base, few, states[:, : few.windows.shape[1]], _PROBES, 0, routing
    )
    costs = {option: slope.second for option, slope in found.items()}
    rows[f"gradients, {_GRADIENT_TOKENS} x {_PROBES}"] = accuracy(groups, costs, true)
    figures(rows, args.json)


if __name__ == "__main__":
    main()
