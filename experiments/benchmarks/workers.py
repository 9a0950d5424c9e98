"""What a second Ray worker brings: the same study with one and with two, one after the other.

    python -m experiments.benchmarks.workers OUT --json experiments/results/workers.json

The first run prepares calibration, bank and costs, which the others take over; each pair of runs then has the
same trials to do. Reported are seconds of the trial stage, their ratio, and whether every trial's KL agrees.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.figures import figures


def run(out: Path, workers: int, trials: int, prepared: Path | None) -> dict[str, Any]:
    """A study of so many trials, its result; done before, it is read."""
    if not (out / "result.json").exists():
        if prepared is not None and not out.exists():
            shutil.copytree(
                prepared / "cache", out / "cache", ignore=shutil.ignore_patterns("slopes", "scores")
            )
        command = [
            sys.executable, "-m", "search.run", "--budget", "103GB", "--out", str(out), "--study", out.name,
            "--workers", str(workers), "--trials", str(trials), "--tasks", "none", "--repair", "none",
            "--no-export",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "result.json").read_text("utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = args.out / "prepared"
    run(prepared, 2, 13, None)
    rows: dict[str, Any] = {}
    for repeat in range(args.repeats):
        found = {
            n: run(args.out / f"workers-{n}-{repeat}", n, args.trials, prepared)
            for n in ((1, 2) if repeat % 2 == 0 else (2, 1))
        }
        kl = {n: [t["scores"]["kl"] for t in r["trials"]] for n, r in found.items()}
        seconds = {n: r["trial_stage"]["seconds"] for n, r in found.items()}
        rows[f"repeat {repeat}"] = {
            "trials": args.trials,
            "seconds_1": seconds[1],
            "seconds_2": seconds[2],
            "speed_up": round(seconds[1] / seconds[2], 3),
            "largest_difference_of_kl": max(abs(a - b) for a, b in zip(kl[1], kl[2], strict=True)),
            "same_winners": found[1]["winners"] == found[2]["winners"],
        }
    figures(rows, args.json)


if __name__ == "__main__":
    main()
