"""Repairs on and off: `python -m experiments.repairs OUT RUN [RUN ...] --json FILE`.

OUT is a folder of `experiments.benchmarks.search`, RUN the name of a run in it (as moefit-103-0);
its candidate is scored on the report text as it is; with its tensors quantized anew for the inputs
they see in it (importance matrix alone, or error feedback between columns); with scales, norms and
routers re-fitted; and with both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from compression.files import write_text
from compression.overrides import Overrides
from compression.requantize import requantized
from evaluators.divergence import measure
from evaluators.texts import TextSet
from evaluators.tuning import Tuner
from experiments.baselines.lab import Lab
from search.worker import Worker
from spaces.candidate import Candidate


def score(worker: Worker, candidate: Candidate, overrides: Overrides | None) -> dict[str, float]:
    """Report scores of a candidate with repairs."""
    model = worker.model
    text: TextSet = worker._text("report", 10**9)
    model.apply(candidate)
    model.use(overrides)
    found = measure(model, text, worker._states("report"))
    model.use(None)
    return {k: round(v, 5) for k, v in found.scores().items()}


def repaired(worker: Worker, candidate: Candidate, brief: bool) -> dict[str, Any]:
    """Scores and seconds of each combination; `brief`: of all repairs together alone."""
    model, calibration = worker.model, worker._text("calibration", 10**9)
    text = worker._text("repair", 10**9)
    out: dict[str, Any] = {"none": score(worker, candidate, None)}
    if not brief:
        begun = time.perf_counter()
        refreshed = requantized(model, candidate, calibration.windows, rounds=0)
        taken = round(time.perf_counter() - begun, 1)
        out["importance refreshed"] = score(worker, candidate, refreshed) | {"seconds": taken}
    begun = time.perf_counter()
    again = requantized(model, candidate, calibration.windows)
    taken = round(time.perf_counter() - begun, 1)
    out["error feedback"] = score(worker, candidate, again) | {"seconds": taken}
    combinations = (("re-fitted", None), ("error feedback, re-fitted", again))
    for name, start in combinations[brief:]:
        begun = time.perf_counter()
        fitted = Tuner(model, candidate).run(text, start=start)
        taken = round(time.perf_counter() - begun, 1)
        out[name] = score(worker, candidate, fitted) | {"seconds": taken}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--brief", action="store_true", help="no repair alone but error feedback")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    worker = Lab.open(args.out / "cache")
    known = args.json is not None and args.json.exists()
    rows = json.loads(args.json.read_text("utf-8")) if known else {}
    for name in args.runs:
        if name in rows:
            continue
        record = json.loads((args.out / "runs" / f"{name}.json").read_text("utf-8"))
        rows[name] = repaired(worker, Candidate.from_json(json.dumps(record["candidate"])), args.brief)
        print(name, json.dumps(rows[name]), flush=True)
        if args.json:
            write_text(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
