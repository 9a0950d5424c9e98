"""Do the scores a search goes by rank configs as what matters does?

    python -m experiments.proxy_validity OUT --study NAME [--storage URL] --json FILE

Makes portable configs spread over the space (budgets from the smallest config to near the whole
model; knapsack draws of disturbed costs, and random ones), measures each proxy and each outcome,
and writes rank correlations with 95 % intervals (bootstrap over configs) and a plot. One file per
config in OUT: killed, it goes on. Proxies: KL on 512, 4,608 and 16,384 search tokens, perplexity
there, and the additive model before any trial. Outcomes: KL on report text, accuracy of lm-eval
tasks (mean over tasks), llama.cpp's own perplexity of the exported file on report text.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from compression.files import atomic, write_text
from evaluators.harness import known_tasks
from experiments.verify_exports import random_params
from search.allocator import Allocator
from search.cache_files import load_text
from search.commands import run_command
from search.options import Parser, at_least, seed
from search.pool import LocalPool
from search.rebuild import OpenStudy
from search.report.facts import Facts
from search.runner import RUNGS
from search.study import window_scores
from search.verify import verify_gguf
from spaces.allocation import InfeasibleError
from spaces.candidate import Candidate
from spaces.space import PORTABLE

PROXIES = {
    "kl_512": "search KL, 512 tokens",
    "kl_4608": "search KL, 4,608 tokens",
    "kl_16384": "search KL, 16,384 tokens",
    "search_perplexity": "search perplexity, 16,384 tokens",
    "additive": "additive model, before any trial",
}
OUTCOMES = {
    "report_kl": "report KL",
    "accuracy": "lm-eval accuracy",
    "llama_perplexity": "llama.cpp perplexity",
}
_REPORT_TOKENS, _LLAMA_TOKENS, _RESAMPLES = 16_384, 8_192, 1_000
_LIMITS = (1.05, 3.2)  # of the smallest config's bytes
_DISTURBED = 0.8  # of the logarithm of costs


def configs(facts: Facts, count: int, seed: int) -> list[dict[str, Any]]:
    """Parameters spread over the space; every third is random through and through."""
    rng, space, out = np.random.default_rng(seed), facts.space, list[dict[str, Any]]()
    smallest = facts.problem.smallest
    while len(out) < count:
        if len(out) % 3 == 2:
            out.append(random_params(space, rng))
            continue
        limit = smallest * float(np.exp(rng.uniform(*np.log(_LIMITS))))
        costs = facts.costs.costs * np.exp(_DISTURBED * rng.standard_normal(len(facts.costs.costs)))
        top_k = int(rng.choice(space.top_k_options)) if rng.random() < 0.4 else None
        chosen = None if top_k is None else dict.fromkeys(space.inventory.moe_layers, top_k)
        try:
            allocator = Allocator(space, facts.costs, facts.problem.carry, int(limit))
            out.append(allocator.draw(costs, PORTABLE, chosen))
        except InfeasibleError:
            continue
    return out


def measure(facts: Facts, params: dict[str, Any], folder: Path, tasks: list[str]) -> dict[str, Any]:
    """Every proxy and outcome of one config."""
    worker = facts.opened.worker
    candidate: Candidate = facts.space.candidate(params)
    text = candidate.to_json()
    row: dict[str, Any] = {"candidate": candidate.key, "additive": facts.costs.predict(params)}
    row["target_bytes"] = facts.target.file_bytes(facts.problem.carry.plan(candidate.plan))
    for tokens in RUNGS:
        columns = worker.score([text], "search", tokens)[0]
        row[f"kl_{tokens}"] = float(np.mean(columns["kl"]))
    row["search_perplexity"] = window_scores(columns, 1.0, tokens)["perplexity"]
    row["report_kl"] = float(np.mean(worker.score([text], "report", _REPORT_TOKENS)[0]["kl"]))
    if tasks:
        scores = worker.tasks(text)
        row["tasks"] = {t: s["value"] for t, s in scores.items()}
        row["accuracy"] = float(np.mean(list(row["tasks"].values())))
    path = folder / f"{candidate.key}.gguf"
    try:
        worker.export(text, str(path))
        pool = LocalPool(worker.setup)
        pool.worker = worker
        report = load_text("report", worker.cache)
        check = verify_gguf(path, pool, candidate, report, folder, _LLAMA_TOKENS)
        row["llama_perplexity"] = check["perplexity"]
    finally:
        path.unlink(missing_ok=True)
    return row


def correlations(rows: list[dict[str, Any]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Proxy to outcome to Spearman's and Kendall's coefficient, each with a 95 % interval.

    Signs are turned so that 1 is a proxy that ranks as the outcome does.
    """
    out: dict[str, dict[str, Any]] = {}
    picks = np.random.default_rng(seed).integers(0, len(rows), (_RESAMPLES, len(rows)))
    for proxy in PROXIES:
        out[proxy] = {}
        for outcome in OUTCOMES:
            if outcome not in rows[0]:
                continue
            x = np.array([r[proxy] for r in rows])
            y = np.array([r[outcome] for r in rows]) * (-1 if outcome == "accuracy" else 1)
            found = {}
            for name, measure_of in (("spearman", spearmanr), ("kendall", kendalltau)):
                some = [measure_of(x[p], y[p]).statistic for p in picks]
                low, high = np.nanquantile(some, (0.025, 0.975))
                found[name] = [round(float(v), 4) for v in (measure_of(x, y).statistic, low, high)]
            out[proxy][outcome] = found
    return out


def draw(rows: list[dict[str, Any]], found: dict[str, dict[str, Any]], path: Path) -> None:
    """Proxies down, outcomes across."""
    from search.report import draw as shared

    outcomes = [o for o in OUTCOMES if o in rows[0]]
    proxies = ("kl_512", "kl_16384", "additive")
    made, axes = shared.figure(columns=len(outcomes), rows=len(proxies), width=11, height=9)
    for i, proxy in enumerate(proxies):
        for j, outcome in enumerate(outcomes):
            axis = axes[i][j]
            axis.plot([r[proxy] for r in rows], [r[outcome] for r in rows], "o", markersize=4,
                      color=shared.BLUE, alpha=0.7)  # fmt: skip
            shared.plain_log(axis)
            if outcome != "accuracy":
                axis.set_yscale("log")
            axis.set_xlabel(PROXIES[proxy] + (" (nats)" if "perplexity" not in proxy else ""), fontsize=9)
            axis.set_ylabel(OUTCOMES[outcome] + (" (nats)" if outcome == "report_kl" else ""), fontsize=9)
            rho, low, high = found[proxy][outcome]["spearman"]
            axis.set_title(f"Spearman {rho:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
            axis.grid(alpha=0.25)
    with atomic(path) as stream:
        stream.write(shared.png(made))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    outcomes = list(next(iter(found.values())))
    head = " | ".join(OUTCOMES[o] for o in outcomes)
    lines = [f"| proxy | {head} |", "|---" * (len(outcomes) + 1) + "|"]
    for proxy, row in found.items():
        cells = [
            "{:.2f} ({:.2f} to {:.2f}), {:.2f}".format(*row[o]["spearman"], row[o]["kendall"][0])
            for o in outcomes
        ]
        lines.append(f"| {PROXIES[proxy]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for one file per config")
    parser.add_argument("--study", required=True)
    parser.add_argument("--storage")
    parser.add_argument("--count", type=int, default=66)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=100, help="items per task; 0: no tasks")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    at_least("--count", args.count, 1)
    at_least("--limit", args.limit, 0)
    seed(args.seed)
    opened = OpenStudy.open(args.study, args.storage)
    tasks = known_tasks() if args.limit else []
    opened.worker.setup = replace(opened.worker.setup, tasks=tuple(tasks), limit=max(1, args.limit))
    facts, rows = Facts.read(opened, "best"), []
    for i, params in enumerate(configs(facts, args.count, args.seed)):
        file = args.out / f"{facts.space.candidate(params).key}-{args.limit}.json"
        if not file.exists():
            write_text(file, json.dumps(measure(facts, params, args.out, tasks)))
        rows.append(json.loads(file.read_text("utf-8")))
        print(f"{i + 1}/{args.count}: {rows[-1]}", flush=True)
    found = correlations(rows)
    about = {"configs": len(rows), "report_tokens": _REPORT_TOKENS, "llama_tokens": _LLAMA_TOKENS,
             "tasks": tasks, "items": args.limit}  # fmt: skip
    write_text(args.json, json.dumps({"about": about, "correlations": found, "rows": rows}, indent=1) + "\n")
    draw(rows, found, args.json.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    run_command(main)
