"""What a second Ray worker brings: the trials of one study with one worker and with two.

    python -m experiments.benchmarks.workers OUT --json experiments/results/workers.json

Calibration, bank and costs are made once, and taken over by every run; each then has the same trials to do,
up to the finals. Reported are seconds of the trial stage, their ratio, and whether every trial's KL agrees.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from compression.files import write_text
from experiments.figures import figures
from search import engine
from search.commands import quiet_libraries
from search.options import parse
from search.study import finished


def run(out: Path, workers: int, trials: int, prepared: Path | None) -> dict[str, Any]:
    """Seconds and KL of so many trials; measured before, they are read."""
    file = out / "trials.json"
    if not file.exists():
        shutil.rmtree(out, ignore_errors=True)
        if prepared is not None:
            shutil.copytree(prepared / "cache", out / "cache", ignore=shutil.ignore_patterns("slopes"))
        arguments = [
            "--budget", "103GB", "--out", str(out), "--study", out.name, "--workers", str(workers),
            "--trials", str(trials), "--tasks", "none",
        ]  # fmt: skip
        with mock.patch.object(engine, "finish", _only_trials):
            write_text(file, json.dumps(engine.Search.open(parse(arguments)).run()))
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _only_trials(running: engine.Running) -> dict[str, Any]:
    """In place of the finals."""
    running.tracker.finish({}, {}, "")
    return {
        "seconds": running.runner.seconds,
        "kl": [t.user_attrs["scores"]["kl"] for t in finished(running.study)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prepared", type=Path, help="folder of a run whose cache is taken over")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    prepared = args.prepared or args.out / "prepared"
    if args.prepared is None:
        run(prepared, 2, 1, None)
    rows: dict[str, Any] = {}
    for repeat in range(args.repeats):
        order = (1, 2) if repeat % 2 == 0 else (2, 1)
        found = {n: run(args.out / f"{n}-{repeat}", n, args.trials, prepared) for n in order}
        one, two = found[1], found[2]
        rows[f"repeat {repeat}"] = {
            "trials": args.trials,
            "seconds_1_worker": round(one["seconds"], 1),
            "seconds_2_workers": round(two["seconds"], 1),
            "speed_up": round(one["seconds"] / two["seconds"], 3),
            "largest_difference_of_kl": max(abs(a - b) for a, b in zip(one["kl"], two["kl"], strict=True)),
        }
    figures(rows, args.json)


if __name__ == "__main__":
    main()
