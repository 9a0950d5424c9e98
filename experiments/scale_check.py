"""How far the model of work and the simulation are from what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from compression.families import family
from experiments.scale_trace import Row
from experiments.streaming.make_checkpoint import CONFIG
from search.options import parse
from search.problem import make_problem
from search.scale.estimate import checkpoint_bytes, make_study, stand_in
from search.scale.machines import cached, this_machine
from search.scale.rates import Rates
from search.scale.simulate import Cluster, simulate
from search.scale.stages import Stage, Study, Wave
from search.scale.work import Model, Work

RESULTS = Path(__file__).with_name("results")


def read(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def reference_study(rates: Rates, trials: int) -> Study:
    """The reference run of `experiments.scale_trace`."""
    from compression.checkpoint import open_checkpoint
    from compression.gguf_export import with_tokenizer

    o = parse(["--budget", "103GB", "--workers", "1", "--trials", str(trials)])
    source = with_tokenizer(open_checkpoint(o.model))
    problem = make_problem(source, o.model, o.target, o.budget, o.device, o.context, o.types)
    return make_study(problem, o, False, checkpoint_bytes(o.model), rates)


def by_stage(trace: Mapping[str, Any], rates: Rates) -> dict[str, tuple[float, float]]:
    """Stage to (reckoned, measured) seconds of the reference run with one worker, jobs and driver."""
    rows = [Row(*row) for row in trace["jobs"]]
    machine = cached(this_machine(1, 2**40, 2**40))
    study = reference_study(rates, trace["trials"])
    found = simulate(Cluster(machine, 1, 1, 0.0), study.stages).seconds
    return {
        name: (seconds, sum(r.seconds + r.driver for r in rows if r.stage == name))
        for name, seconds in found.items()
    }


def by_workers(trace: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Workers to (simulated, measured) seconds of the trial stage, 60 trials of the reference model.

    Simulated from the jobs that were measured with one worker; how long a part of a round's candidates
    takes is interpolated between the rounds of experiments/results/population.json.
    """
    rounds = [
        v for k, v in read("population.json").items() if k.startswith("round of") and v["candidates"] <= 16
    ]
    slope, base = np.polyfit([r["candidates"] for r in rounds], [r["seconds_together"] for r in rounds], 1)
    measured = read("workers.json").values()
    out = {}
    for workers, key in ((1, "seconds_1_worker"), (2, "seconds_2_workers")):
        waves: list[Wave] = []
        last = ""
        for row in (Row(*r) for r in trace["jobs"] if r[0] == "trials"):
            sizes = _dealt(row.size[0], workers) if row.job == "score" else [1]
            whole = base + slope * sum(sizes)
            if row.job == "slopes" and waves and last == "slopes":  # of both forms, in one call
                waves[-1] = Wave((*waves[-1].jobs, Work(row.seconds)), waves[-1].driver)
                continue
            last = row.job
            parts = [
                row.seconds * (base + slope * n) / whole if len(sizes) > 1 else row.seconds for n in sizes
            ]
            waves.append(Wave(tuple(Work(s) for s in parts), row.driver))
        stages = [Stage("trials", tuple(waves))]
        cluster = Cluster(cached(this_machine(workers, 2**40, 2**40)), 1, workers, 0.0)
        found = simulate(cluster, lambda _, stages=stages: stages)  # type: ignore[misc]
        seconds = found.seconds["trials"] * mean(m["trials"] for m in measured) / trace["trials"]
        out[workers] = seconds, mean(m[key] for m in measured)
    return out


def _dealt(candidates: int, workers: int) -> list[int]:
    """Candidates of each job, as `search.runner` deals them."""
    share = -(-candidates // workers)
    return [min(share, candidates - i) for i in range(0, candidates, share)]


def by_streaming(rates: Rates) -> dict[str, tuple[float, float]]:
    """Stage to (reckoned, measured) seconds of the 31 GB checkpoint of experiments/results/streaming.json."""
    found = read("streaming.json")
    inventory = family({**CONFIG, "num_hidden_layers": found["layers"]}, "streamed").inventory()
    space = stand_in(inventory, "any", tuple(found["stages"]["quantization"]["types"]))
    model = Model(space, rates, True, found["checkpoint_bytes"], "BF16", found["stages"]["export"]["bytes"])
    calibration = model.read() + model.run(*model.text(found["stages"]["calibration"]["tokens"], False))
    study = Study(model, 1, 0)
    quantized = next(s for s in study.stages(1) if s.name == "quantization").work
    # A process took both types of a tensor at once there, and read it once.
    quantized = quantized + model.read() * -1
    workers = found["stages"]["quantization"]["workers"]
    return {
        "calibration": (calibration.seconds, found["stages"]["calibration"]["seconds"]),
        "quantization": (quantized.seconds / workers, found["stages"]["quantization"]["seconds"]),
    }


def table(rows: Mapping[Any, Sequence[float]], head: str) -> str:
    """Markdown of reckoned and measured seconds."""
    lines = [f"| {head} | reckoned | measured | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:,.0f} s | {b:,.0f} s | {a / b:.2f} |" for name, (a, b) in rows.items() if b]
    return "\n".join(lines)
