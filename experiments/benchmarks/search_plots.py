"""Tables and plots of the search benchmark, from its JSON alone.

    python -m experiments.benchmarks.search_plots experiments/results/search.json experiments/results

Writes `search_curves.png` (report KL against tokens spent, a panel per budget),
`search.md` (final table, verdicts on the targets, crossover map) beside them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.files import write_text
from experiments.baselines.levers import ABLATION
from experiments.baselines.moefit import OURS
from experiments.benchmarks.search import METHODS

Record = dict[str, Any]
_Z95 = 1.96


class Results:
    """Records by method and budget."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        self.budgets = sorted({r["gigabytes"] for r in records})
        self.methods = [m for m in METHODS if any(r["method"] == m for r in records)]

    def of(self, method: str, budget: float) -> list[Record]:
        """Runs that ended with a candidate, by seed."""
        found = [r for r in self.records if r["method"] == method and r["gigabytes"] == budget and "kl" in r]
        return sorted(found, key=lambda r: r["seed"])

    def mean(self, method: str, budget: float) -> float:
        """Report KL, seeds averaged; infinite where the budget was not met."""
        runs = self.of(method, budget)
        return float(np.mean([r["kl"] for r in runs])) if runs else math.inf

    def interval(self, method: str, budget: float) -> float:
        """Half width of the 95 % interval of `mean`: over windows, of each window's mean over seeds."""
        runs = self.of(method, budget)
        windows = np.mean([r["kl_windows"] for r in runs], axis=0)
        return float(_Z95 * windows.std(ddof=1) / math.sqrt(len(windows)))

    def best(self, methods: Sequence[str], budget: float) -> tuple[str, float]:
        """The method of lowest mean KL."""
        name = min(methods, key=lambda m: self.mean(m, budget))
        return name, self.mean(name, budget)


def _cell(results: Results, method: str, budget: float) -> str:
    runs = results.of(method, budget)
    if not runs:
        return "does not fit" if any(
            r["method"] == method and r["gigabytes"] == budget for r in results.records
        ) else "not run"  # fmt: skip
    spread = (
        f" ({min(r['kl'] for r in runs):.4f} to {max(r['kl'] for r in runs):.4f})" if len(runs) > 1 else ""
    )
    return f"{results.mean(method, budget):.4f} ± {results.interval(method, budget):.4f}{spread}"


def table(results: Results, methods: Sequence[str]) -> list[str]:
    """Markdown rows: mean KL with its interval over windows, and the range over seeds."""
    head = [f"{b:g} GB" for b in results.budgets]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(_cell(results, method, b) for b in results.budgets) + " |")
    return lines


def byte_table(results: Results, methods: Sequence[str]) -> list[str]:
    """Markdown rows: bytes of every result over the limit's."""
    head = [f"{b:g} GB" for b in results.budgets]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for method in methods:
        cells = []
        for b in results.budgets:
            runs = results.of(method, b)
            sizes = sorted({r["bytes"] for r in runs})
            limit = runs[0]["limit_bytes"] if runs else 0
            cells.append(" / ".join(f"{s:,}" for s in sizes) + f" of {limit:,}" if runs else "-")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def tokens_to_reach(results: Results, method: str, budget: float, level: float) -> float:
    """Tokens after which a method's offers are at or below a KL, seeds averaged; infinite if never."""
    needed = []
    for run in results.of(method, budget):
        reached = [tokens for tokens, kl in run["curve"] if kl <= level]
        needed.append(reached[0] if reached else math.inf)
    return float(np.mean(needed)) if needed else math.inf


def verdicts(results: Results) -> list[str]:
    """The targets, each met or missed, with its figure."""
    published = [m for m in results.methods if METHODS[m].published]
    peers = [m for m in results.methods if m not in OURS and m not in ABLATION]
    head = "budget | best peer | ours / best peer | best published | ours / published | ours / EvoPress-joint"
    lines = [f"| {head} | EvoPress's KL reached with | RCO's with |", "|---" * 8 + "|"]
    for b in results.budgets:
        ours = results.mean("moefit", b)
        peer, peer_kl = results.best(peers, b)
        name, kl = results.best(published, b)
        row = [f"{b:g} GB", peer, f"{ours / peer_kl:.3f}", name, f"{ours / kl:.3f}"]
        row.append(_ratio(ours, results.mean("evopress-joint", b)))
        for other in ("evopress", "rco"):
            level, spent = results.mean(other, b), _spent(results, other, b)
            needed = tokens_to_reach(results, "moefit", b, level)
            row.append(f"{needed / spent:.3f} of its tokens" if math.isfinite(needed) else "never")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.3f}" if math.isfinite(theirs) else "-"


def _spent(results: Results, method: str, budget: float) -> float:
    runs = results.of(method, budget)
    return float(np.mean([r["spent"] for r in runs])) if runs else math.nan


def crossover(results: Results) -> list[str]:
    """What the best candidates use at each budget."""
    lines = ["| budget | experts kept (mean of 16) | by layer | top-k | bits of experts | bits of the rest |",
             "|---" * 6 + "|"]  # fmt: skip
    for b in results.budgets:
        runs = results.of("moefit", b)
        if not runs:
            continue
        best = min(runs, key=lambda r: r["kl"])
        kept = np.mean([np.mean(r["shape"]["kept"]) for r in runs])
        bits = [np.mean([r["shape"][k] for r in runs]) for k in ("expert_bits", "other_bits")]
        shape = best["shape"]
        lines.append(
            f"| {b:g} GB | {kept:.1f} | {', '.join(map(str, shape['kept']))} | "
            f"{', '.join(map(str, shape['top_k']))} | {bits[0]:.2f} | {bits[1]:.2f} |"
        )
    return lines


def repairs(results: Results, rows: Mapping[str, Any]) -> list[str]:
    """What repairs make of a run's candidate (`experiments.repairs`), against the best published method."""
    steps = list(dict.fromkeys(step for row in rows.values() for step in row))
    lines = ["| run | " + " | ".join(steps) + " | over the best published |", "|---" * (len(steps) + 2) + "|"]
    published = [m for m in results.methods if METHODS[m].published]
    for run, row in rows.items():
        _, best = results.best(published, float(run.split("-")[-2]))
        cells = [f"{row[s]['kl']:.4f}" if s in row else "-" for s in steps]
        lowest = min(found["kl"] for found in row.values())
        lines.append(f"| {run} | " + " | ".join(cells) + f" | {lowest / best:.3f} |")
    return lines


def draw(results: Results, path: Path) -> None:
    """Report KL of the choice against tokens spent, a panel per budget; lines are means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    searching = [m for m in results.methods if METHODS[m].searches and m not in ABLATION]
    fixed = [m for m in results.methods if not METHODS[m].searches and METHODS[m].published]
    columns = min(3, len(results.budgets))
    rows = -(-len(results.budgets) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 4.2 * rows), squeeze=False)
    colours = {m: f"C{i % 10}" for i, m in enumerate(searching)}
    for axis, budget in zip(axes.flat, results.budgets, strict=False):
        for method in searching:
            for i, run in enumerate(results.of(method, budget)):
                x, y = zip(*[*run["curve"], [run["spent"], run["curve"][-1][1]]], strict=True)
                style: Mapping[str, Any] = {"lw": 2.4} if method in OURS else {"lw": 1.1, "alpha": 0.8}
                axis.step(x, y, where="post", color=colours[method], label=None if i else method, **style)
        found = [(m, results.mean(m, budget)) for m in fixed]
        reachable = [(m, kl) for m, kl in found if math.isfinite(kl)]
        if reachable:
            name, level = min(reachable, key=lambda f: f[1])
            axis.axhline(level, color="0.5", ls=":", lw=1.2, label=f"best rule ({name})")
        axis.set(
            title=f"{budget:g} GB for DeepSeek-V3",
            xlabel="tokens of forward pass",
            xscale="log",
            yscale="log",
        )
        axis.set_ylabel("KL on report text (nats)")
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=6.5)
    for axis in list(axes.flat)[len(results.budgets) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repairs", type=Path, help="JSON of experiments.repairs")
    args = parser.parse_args()
    results = Results(json.loads(args.results.read_text("utf-8")))
    compared = [m for m in results.methods if m not in ABLATION]
    ablated = [m for m in ("moefit", *ABLATION) if m in results.methods]
    parts = [
        "## KL on the report text (nats): mean over seeds ± 95 % over windows (range over seeds)",
        *table(results, compared),
        "## Targets", *verdicts(results),
        "## Crossover map: what the best candidates use", *crossover(results),
        "## The same search with levers forbidden", *table(results, ablated),
        "## Bytes of every result", *byte_table(results, [*compared, *ablated[1:]]),
    ]  # fmt: skip
    if args.repairs:
        rows = json.loads(args.repairs.read_text("utf-8"))
        parts += [
            "## Repaired, at the same bytes (report text; their tokens come on top)",
            *repairs(results, rows),
        ]
    text = "\n".join(f"\n{line}\n" if line.startswith("#") else line for line in parts)
    write_text(args.out / "search.md", text.lstrip() + "\n")
    draw(results, args.out / "search_curves.png")


if __name__ == "__main__":
    main()
