"""The benchmark: every method at every budget, on the same bank, bytes, tokens and evaluator.

    python -m experiments.benchmarks.search OUT            # the full form: hours; run it again and it goes on
    python -m experiments.benchmarks.search OUT --quick    # under ten minutes
    python -m experiments.benchmarks.search_plots RESULTS  # the table and the plots, of the JSON alone

Budgets are DeepSeek-V3's, met by the reference model at the same bits per weight.
Methods spend forward tokens of the search text; what is reported is KL on the report
text, which no method sees. Every run leaves one JSON file, so that nothing is run twice.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from compression.files import write_text
from evaluators.texts import TextSet
from experiments.baselines.lab import Lab, Offer, prepare
from experiments.baselines.levers import ABLATION
from experiments.baselines.method import Method, Unreachable
from experiments.baselines.moefit import OURS
from experiments.baselines.published import PUBLISHED
from experiments.baselines.searches import SEARCHES
from search.worker import Worker
from spaces.allocation import InfeasibleError
from spaces.candidate import Candidate

BUDGETS = (80, 103, 140, 200, 400)
SEEDS = (0, 1, 2)
TOKENS = 120_000
QUICK = {"tokens": 40_000, "budgets": (140,), "seeds": (0,), "slow": ("gp", "rco", "amq")}
METHODS: dict[str, Method] = {**OURS, **PUBLISHED, **SEARCHES, **ABLATION}

_REPORT_TOKENS = 16_384
_CURVE_TOKENS = 4_096
_CURVE_POINTS = 5


@dataclass(frozen=True)
class Job:
    """One run: a method at a budget with a seed."""

    method: str
    gigabytes: float
    seed: int
    tokens: int

    @property
    def file(self) -> str:
        return f"{self.method.replace(' ', '-').replace(',', '')}-{self.gigabytes:g}-{self.seed}.json"


def jobs(methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], tokens: int) -> list[Job]:
    """All runs, seed by seed, so that a benchmark cut short has whole seeds; no method twice for nothing."""
    return [
        Job(name, budget, seed, tokens)
        for seed in seeds
        for budget in budgets
        for name in methods
        if METHODS[name].searches or seed == seeds[0]
    ]


def run(job: Job, worker: Worker, out: Path) -> dict[str, Any]:
    """Runs one job and scores what it offered on the report text."""
    lab = Lab(out / "cache", job.gigabytes, job.seed, job.tokens, worker, scratch=out / "scratch")
    record: dict[str, Any] = {**asdict(job), "limit_bytes": lab.limit}
    begun = time.perf_counter()
    try:
        METHODS[job.method].run(lab)
    except (Unreachable, InfeasibleError) as error:
        return record | {"unreachable": str(error)}
    record |= {"seconds": round(time.perf_counter() - begun, 2), "spent": lab.spent}
    if not lab.offers:
        return record | {"unreachable": "no candidate within the tokens"}
    final = lab.offers[-1].candidate
    text: TextSet = worker._text("report", _REPORT_TOKENS)
    states = worker._states("report")
    kl = worker.population.measure([worker.settings.of(final)], text, states)[0].kl
    points = curve(lab.offers)
    found = worker.population.measure(
        [worker.settings.of(o.candidate) for o in points], text.head(_CURVE_TOKENS), states
    )
    return record | {
        "bytes": lab.size(final),
        "kl": float(kl.mean()),
        "kl_windows": [round(float(x), 5) for x in kl],
        "first_tokens": lab.offers[0].tokens,
        "curve": [[o.tokens, round(d.mean_kl, 5)] for o, d in zip(points, found, strict=True)],
        "shape": shape(lab, final),
        "candidate": json.loads(final.to_json()),
    }


def curve(offers: Sequence[Offer]) -> list[Offer]:
    """The first, the last and some offers between, evenly spaced in the logarithm of tokens."""
    if len(offers) <= _CURVE_POINTS:
        return list(offers)
    logs = np.log([max(1, o.tokens) for o in offers])
    wanted = np.linspace(logs[0], logs[-1], _CURVE_POINTS)
    return [offers[i] for i in sorted({int(np.abs(logs - w).argmin()) for w in wanted})]


def shape(lab: Lab, candidate: Candidate) -> dict[str, Any]:
    """How much of each lever a candidate uses."""
    plan, inventory = candidate.plan, lab.inventory
    kept, types = dict(plan.kept), dict(plan.types)
    stored = {t.name: int(np.prod(t.kept_shape(kept.get(t.layer or 0)))) for t in inventory.quantizable}
    size = {
        t.name: t.bytes(types[t.name], kept.get(t.layer or 0) if t.per_expert else None)
        for t in inventory.quantizable
    }

    def bits(names: Sequence[str]) -> float:
        return 8 * sum(size[n] for n in names) / max(1, sum(stored[n] for n in names))

    experts = [t.name for t in inventory.quantizable if t.per_expert]
    others = [t.name for t in inventory.quantizable if not t.per_expert]
    return {
        "kept": [n for _, n in plan.kept],
        "top_k": [k for _, k in plan.top_k],
        "portable": plan.portable,
        "expert_bits": round(bits(experts), 3),
        "other_bits": round(bits(others), 3),
    }


def _work(task: tuple[list[Job], Path]) -> None:
    """One process: its jobs, one after the other, a file each."""
    import torch

    todo, out = task
    torch.set_num_threads(1)
    worker = Lab.open(out / "cache")
    for job in todo:
        file = out / "runs" / job.file
        if file.exists():
            continue
        record = run(job, worker, out)
        write_text(file, json.dumps(record))
        said = record.get("unreachable") or f"KL {record['kl']:.4f}, {record['spent']} tokens"
        print(f"{job.gigabytes:g} GB, seed {job.seed}, {job.method}: {said}", flush=True)


def collect(out: Path, todo: Sequence[Job]) -> list[dict[str, Any]]:
    """Records of the jobs that have finished."""
    files = [out / "runs" / job.file for job in todo]
    return [json.loads(f.read_text("utf-8")) for f in files if f.exists()]


def restore(out: Path, file: Path | None) -> None:
    """Puts records of an earlier run, perhaps of another machine, where they count as done."""
    if file is None or not file.exists():
        return
    for record in json.loads(file.read_text("utf-8")):
        job = Job(record["method"], record["gigabytes"], record["seed"], record["tokens"])
        if not (out / "runs" / job.file).exists():
            write_text(out / "runs" / job.file, json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for cache and runs")
    parser.add_argument("--quick", action="store_true", help="one budget, one seed, few tokens")
    parser.add_argument("--methods", default=",".join(METHODS).replace(", ", "+"), help="names, + inside")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for all records; those it holds are not run again")
    args = parser.parse_args()
    names = [n.replace("+", ", ") for n in args.methods.split(",")]
    budgets, seeds = [float(b) for b in args.budgets.split(",")], [int(s) for s in args.seeds.split(",")]
    tokens = args.tokens
    if args.quick:
        names = [n for n in names if n not in QUICK["slow"] and n not in ABLATION]  # type: ignore[operator]
        budgets, seeds, tokens = list(QUICK["budgets"]), list(QUICK["seeds"]), QUICK["tokens"]  # type: ignore[call-overload]
    todo = jobs(names, budgets, seeds, tokens)
    restore(args.out, args.json)
    prepare(args.out / "cache", lambda stage: print(f"{stage} ...", flush=True))
    shares = [(todo[i :: args.processes], args.out) for i in range(args.processes)]
    if args.processes == 1:
        _work(shares[0])
    else:
        with get_context("spawn").Pool(args.processes) as pool:
            pool.map(_work, shares, chunksize=1)
    if args.json:
        rows = [json.dumps(r) for r in collect(args.out, jobs(list(METHODS), BUDGETS, SEEDS, tokens))]
        write_text(args.json, "[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
