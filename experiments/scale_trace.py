"""What every job of a search costs on this machine: CPU seconds, job by job, of one whole reference run.

    python -m experiments.scale_trace OUT --trials 60 --json experiments/results/scale_trace.json

The run has no other workers, so that the CPU time of this process is that of its jobs, whatever else the
machine does; what passes between two jobs (asks, tells, tracking) is the driver's and goes to the later one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from compression.checkpoint import open_checkpoint
from compression.files import write_text
from evaluators.texts import WINDOW
from evaluators.tuning import Recipe
from experiments.decode_speed import cpu
from experiments.slow_suite import commit
from search import engine
from search.commands import run_command
from search.console import Stages
from search.options import DEFAULT_TASKS, REFERENCE_MODEL, parse
from search.pool import Job, LocalPool
from search.runner import RUNGS, SLOPE_PROBES, SLOPE_TOKENS
from search.scale.work import spread_over

LIMIT = 100
"""lm-eval items of a task, as `search.run` takes them by default."""


class Row(NamedTuple):
    """A job: its stage, its method, its size, its CPU seconds and the driver's before it."""

    stage: str
    job: str
    size: list[int]
    seconds: float
    driver: float


class Trace:
    """Rows of [stage, job, size, CPU seconds, the driver's CPU seconds before it].

    The size is of candidates for `score`, of options for `costs`, of weights times types for `quantize`.
    """

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.stage = ""
        self.last = time.process_time()

    def run(
        self, pool: LocalPool, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, r: None
    ) -> list[Any]:
        """In place of `LocalPool.run`."""
        results = []
        for i, (method, args) in enumerate(jobs):
            begun = time.process_time()
            results.append(getattr(pool.worker, method)(*args))
            ended = time.process_time()
            driver, self.last = begun - self.last, ended
            if method != "peak_memory":
                size = self._size(pool, method, args)
                self.rows.append([self.stage, method, size, round(ended - begun, 4), round(driver, 4)])
            on_result(i, results[-1])
        return results

    def _size(self, pool: LocalPool, method: str, args: Sequence[Any]) -> list[int]:
        if method == "quantize":
            tensor, types = args[:2]
            return [pool.worker.inventory.by_name[tensor].parameters * len(types)]
        if method == "score":
            return [len(args[0]), int(args[2])]
        return [len(args[0]), int(args[1])] if method == "costs" else []


def trace(out: Path, trials: int) -> dict[str, Any]:
    """A whole run of the reference model; what the JSON holds."""
    found, of = Trace(), commit()
    whole = Stages.stage

    def named(self: Stages, name: str) -> Any:
        found.stage = name
        return whole(self, name)

    arguments = ["--budget", "103GB", "--out", str(out), "--workers", "0", "--trials", str(trials)]
    with (
        mock.patch.object(LocalPool, "run", lambda pool, *args: found.run(pool, *args)),
        mock.patch.object(Stages, "stage", named),
    ):
        result = engine.Search.open(parse(arguments)).run()
    return {
        "cpu": cpu(), "date": datetime.date.today().isoformat(), "commit": of, "trials": trials,
        "parameters": open_checkpoint(REFERENCE_MODEL).inventory.parameters(),
        "tokens": [t["scores"]["tokens"] for t in result["trials"]],
        "baselines": sum(bool(t["baseline"]) for t in result["trials"]),
        "stages": result["stages"], "jobs": found.rows,
    }  # fmt: skip


def of_trace(found: dict[str, Any]) -> dict[str, Any]:
    """The rates that only a whole run shows; see `search.scale.rates.Rates`."""
    jobs, trials = [Row(*row) for row in found["jobs"]], found["trials"]
    asked = [row for row in jobs if row.stage == "trials"]
    scores = [row for row in asked if row.job == "score"]
    free = found["tokens"][found["baselines"] :]
    # A job's time over that of the others of its rung, each for as many candidates.
    rungs = {tokens: [r.seconds / r.size[0] for r in scores if r.size[1] == tokens] for tokens in RUNGS}
    spread = [math.log(s / statistics.median(some)) for some in rungs.values() for s in some]
    forward = statistics.median(r.seconds / r.size[1] for r in jobs if r.stage == "finalists")
    items = LIMIT * len(DEFAULT_TASKS)
    tasks = statistics.median(r.seconds for r in jobs if r.job == "tasks")
    slopes = statistics.median(r.seconds for r in asked if r.job == "slopes")
    windows, length = spread_over(SLOPE_TOKENS)
    draws = SLOPE_PROBES + 1
    passes = windows * length * (2 + 2 * draws) * forward
    recipe = Recipe()
    fit = 3 * recipe.steps * recipe.windows * WINDOW * forward
    repair = statistics.median(r.seconds for r in jobs if r.job == "repair")
    return {
        "trial": sum(row.driver for row in asked) / trials,
        # A rung may have a few tokens less than asked for, but more than the one before.
        "shares": [sum(t > before for t in free) / len(free) for before in (0, *RUNGS[:-1])],
        "slopes": sum(row.job == "slopes" for row in asked) / trials,
        "gradient": max(0.0, slopes - passes) / found["parameters"] / windows / draws,
        "spread": statistics.stdev(spread),
        "task_tokens": tasks / forward / items,
        "repair": max(0.0, repair - fit) / found["parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = json.dumps(trace(args.out, args.trials))
    if args.json:
        write_text(args.json, text.replace("], [", "],\n[") + "\n")


if __name__ == "__main__":
    run_command(main)
