"""What each lever is worth: the search with levers forbidden, or decided one after the other.

    python -m experiments.ablation OUT --json experiments/results/search.json

Runs what is missing of the benchmark's rows (hours from nothing; killed, it goes on), then writes
`ablation.md` and `ablation.png` beside the JSON. Budgets are DeepSeek-V3's, met by the reference
model at the same bits per weight; every run may spend 120,000 tokens of forward pass; KL is on
report text that no run sees, before repairs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compression.files import atomic, write_text
from experiments.baselines.levers import ABLATION
from experiments.benchmarks.search_plots import Results

BUDGETS = (103.0, 140.0, 200.0)
SEEDS = (0, 1, 2)
WHOLE = "moefit"
NAMES = {WHOLE: "all three, jointly"} | {
    name: name.replace("sequential, tuned", "one after the other, best ratio").replace(
        "sequential", "one after the other, the paper's ratio"
    )
    for name in ABLATION
}
_Z95 = 1.96


def paired(results: Results, method: str, budget: float) -> tuple[float, float]:
    """How much more KL than all three jointly, and the half width of its 95 % interval over windows."""
    ours, theirs = (
        np.mean([r["kl_windows"] for r in results.of(m, budget)], axis=0) for m in (WHOLE, method)
    )
    difference = theirs - ours
    return float(difference.mean()), float(_Z95 * difference.std(ddof=1) / math.sqrt(len(difference)))


def cell(results: Results, method: str, budget: float) -> str:
    """KL, range over seeds, and what it is above all three."""
    runs = results.of(method, budget)
    if not runs:
        known = any(r["method"] == method and r["gigabytes"] == budget for r in results.records)
        return "does not fit" if known else "not run"
    kl = [r["kl"] for r in runs]
    said = f"{np.mean(kl):.4f}" + (
        f" ({min(kl):.4f} to {max(kl):.4f}, {len(kl)} seeds)" if len(kl) > 1 else " (1 seed)"
    )
    if method == WHOLE or not results.of(WHOLE, budget):
        return said
    more, half = paired(results, method, budget)
    return f"{said}; {np.mean(kl) / results.mean(WHOLE, budget):.2f} x, {more:+.4f} ± {half:.4f}"


def markdown(results: Results) -> str:
    """The table."""
    head = " | ".join(f"{b:g} GB" for b in BUDGETS)
    lines = [
        "KL on the report text in nats: mean over seeds (range over seeds); ratio to all three jointly, and "
        "difference to it with its 95 % interval, paired by window.",
        "",
        f"| levers | {head} |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    lines += [f"| {NAMES[m]} | " + " | ".join(cell(results, m, b) for b in BUDGETS) + " |" for m in NAMES]
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """A panel per budget, a bar per set of levers, a dot per seed."""
    from search.report import draw as shared

    made, axes = shared.figure(columns=len(BUDGETS), width=13, height=4.2, sharey=True)
    names = list(NAMES)
    for axis, budget in zip(axes, BUDGETS, strict=True):
        for i, method in enumerate(names):
            runs = results.of(method, budget)
            if not runs:
                axis.text(0.02, i, "does not fit", va="center", fontsize=8, color="#6b7280",
                          transform=axis.get_yaxis_transform())  # fmt: skip
                continue
            colour = shared.ORANGE if method == WHOLE else shared.BLUE
            mean = results.mean(method, budget)
            axis.barh(i, mean, xerr=results.interval(method, budget), color=colour, alpha=0.8, capsize=3)
            axis.plot([r["kl"] for r in runs], [i] * len(runs), ".", color="black", markersize=4)
        axis.set_xlim(0, None)
        axis.set_title(f"{budget:g} GB for DeepSeek-V3", fontsize=10)
        axis.set_xlabel("KL (nats per token)")
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), [NAMES[m] for m in names], fontsize=9)
    axes[0].invert_yaxis()
    with atomic(path) as stream:
        stream.write(shared.png(made))


def run_missing(out: Path, file: Path, processes: int, methods: Sequence[str]) -> None:
    """Runs the benchmark's missing rows."""
    subprocess.run(
        [
            sys.executable, "-m", "experiments.benchmarks.search", str(out), "--json", str(file),
            "--methods", ",".join(m.replace(", ", "+") for m in methods),
            "--budgets", ",".join(f"{b:g}" for b in BUDGETS), "--seeds", ",".join(map(str, SEEDS)),
            "--processes", str(processes),
        ],
        check=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="the benchmark's folder")
    parser.add_argument("--json", type=Path, required=True, help="the benchmark's records")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--draw-only", action="store_true", help="of the records there are")
    args = parser.parse_args()
    if not args.draw_only:
        run_missing(args.out, args.json, args.processes, list(NAMES))
    results = Results(json.loads(args.json.read_text("utf-8")))
    write_text(args.json.with_name("ablation.md"), markdown(results))
    draw(results, args.json.with_name("ablation.png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
