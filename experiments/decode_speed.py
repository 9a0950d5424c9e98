"""How true predicted tokens/s are on this machine: `python -m experiments.decode_speed FOLDER [--json FILE]`.

1. Times llama.cpp decoding with random models of one uniform type each, at top-2 and at top-8 of 8, and with
   candidates of mixed types at top-2 to top-8. Rounds go through all of them, so that a machine that is
   slower for a while is so for all; a figure is the median over rounds.
2. Fits this machine's profile to the uniform files alone: `Device.rates`, `overhead`, `bandwidth` and
   `efficiency`.
3. Predicts the mixed ones by `Throughput`, and compares.

FOLDER takes 3.8 GB while it runs, and keeps the times: a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from compression.files import atomic, write_text
from compression.ggml import version
from evaluators.llama_runtime import LlamaModel
from evaluators.throughput import Throughput
from experiments.decode_files import Files, inventory
from search.commands import run_command
from search.options import Parser, at_least
from spaces.candidate import Candidate, MoeLayer
from spaces.carry import Carry
from spaces.devices import Device
from spaces.errors import UserError
from spaces.inventory import Inventory
from spaces.quant_types import LADDER

OTHER_TYPES = ("IQ4_NL", "MXFP4", "Q4_0", "Q5_0", "Q5_1")
"""Types beyond the ladder that files hold: fallbacks for short rows, and what gpt-oss is published in."""
TOP_K = (2, 8)
MIXED_TOP_K = (2, 2, 3, 4, 5, 6, 8, 8)
ROUNDS, PROMPT, GENERATED = 9, 4, 16
CONTEXT = PROMPT + GENERATED


def uniform(model: Inventory, type_name: str, top_k: int) -> Candidate:
    whole = Candidate.uniform(model, type_name)
    return replace(whole, layers=tuple(replace(m, top_k=top_k) for m in whole.layers))


def mixed(model: Inventory) -> dict[str, Candidate]:
    """Candidates to predict: types drawn for every role, and in every second one for every tensor."""
    rng, out = np.random.default_rng(0), {}
    everyone = tuple(range(model.experts))
    for number, top_k in enumerate(MIXED_TOP_K):
        by_role = {t.role: str(rng.choice(LADDER)) for t in model.quantizable}
        types = tuple(
            (t.name, str(rng.choice(LADDER)) if number % 2 else by_role[t.role]) for t in model.quantizable
        )
        layers = tuple(MoeLayer(i, everyone, top_k) for i in model.moe_layers)
        out[f"mixed-{number}-top-{top_k}"] = Candidate(layers, types)
    return out


@dataclass
class Clock:
    """Times candidates, and keeps the times in FOLDER/times.json.

    Attributes:
        times: Name of a candidate to seconds per token, one for each round.
    """

    files: Files
    threads: int
    rounds: int
    times: dict[str, list[float]]

    @classmethod
    def open(cls, files: Files, threads: int, rounds: int) -> Clock:
        """Goes on where another run stopped.

        Raises:
            UserError: The folder's times are of other settings.
        """
        clock = cls(files, threads, rounds, {})
        if clock._file.exists():
            kept = json.loads(clock._file.read_text("utf-8"))
            if kept["settings"] != clock._settings:
                raise UserError(
                    f"{clock._file}: was measured with {kept['settings']}, not {clock._settings}; "
                    "give another folder"
                )
            clock.times = kept["times"]
        return clock

    @property
    def _file(self) -> Path:
        return self.files.folder / "times.json"

    @property
    def _settings(self) -> dict[str, Any]:
        return {"layers": self.files.model.layers, "threads": self.threads, "cpu": cpu(), "ggml": version()}

    def measure(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """Median seconds per token of every candidate. The files are deleted in the end."""
        todo = {n: c for n, c in candidates.items() if len(self.times.get(n, ())) < self.rounds}
        # Candidates that differ in top-k only share a file.
        paths = {name: self.files.write(file_name(c), c.plan) for name, c in todo.items()}
        for number in range(self.rounds):
            started = time.perf_counter()
            for name, candidate in todo.items():
                seconds = self.times.setdefault(name, [])
                if len(seconds) > number:
                    continue
                with LlamaModel(
                    paths[name], context=CONTEXT, threads=self.threads, exact=False,
                    top_k=candidate.layers[0].top_k,
                ) as model:  # fmt: skip
                    seconds.append(1 / model.speed(PROMPT, GENERATED)[1])
                write_text(self._file, json.dumps({"settings": self._settings, "times": self.times}))
            print(f"round {number + 1} of {self.rounds}: {time.perf_counter() - started:.0f} s", flush=True)
        for path in set(paths.values()):
            path.unlink()
        return {name: median(self.times[name][: self.rounds]) for name in candidates}


def file_name(candidate: Candidate) -> str:
    """The same for candidates with the same tensors."""
    return hashlib.sha256(repr((candidate.plan.kept, candidate.types)).encode()).hexdigest()[:16]


def cpu() -> str:
    """What Linux calls the processor."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    wanted = ("model name", "cpu family", "model")
    return ", ".join(f"{n} {fields[n]}" if n != "model name" else fields[n] for n in wanted if n in fields)


def read_bandwidth(threads: int, size: int = 2**28, repeats: int = 12) -> float:
    """Bytes per second that threads read from memory, each its own `size` bytes: the best of some passes."""
    arrays = [np.ones(size // 8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        passes = []
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.sum, arrays))
            passes.append(time.perf_counter() - started)
    return threads * size / min(passes)


def fit(model: Inventory, times: Mapping[tuple[str, int], float], bandwidth: float, device: Device) -> Device:
    """`device` with the bandwidth, efficiency, rates and overhead that explain the times of uniform files.

    Least squares on relative errors, over (type, top-k):

        overhead + weights(top-k) / rate[type] = time

    where `weights` are those a token reads. Efficiency is the most that any type reaches of the bandwidth
    while it reads its weights, so the roofline's other term is the larger one for no type here.

    Args:
        model: The model of the files.
        times: (type, top-k) to seconds per token.
        bandwidth: Bytes per second that were read without decoding; raised to what decoding reaches.
        device: What the profile is called.
    """
    types = sorted({t for t, _ in times})
    one = replace(device, bandwidth=1.0, efficiency=1.0)
    rows, sizes = [], {}
    for (type_name, top_k), seconds in times.items():
        # With a rate of one weight per second and nothing else, the model's time is the weights it reads.
        plan = uniform(model, type_name, top_k).plan
        counting = replace(one, bandwidth=1e30, rates={type_name: 1.0})
        weights = Throughput(Carry(model, model), counting, CONTEXT).seconds(plan)
        sizes[type_name, top_k] = Throughput(Carry(model, model), one, CONTEXT).seconds(plan)
        rows.append([1 / seconds, *(weights / seconds * (t == type_name) for t in types)])
    matrix = np.array(rows)
    scale = matrix.max(0)
    found = nnls(matrix / scale, np.ones(len(rows)))[0] / scale
    overhead, costs = float(found[0]), dict(zip(types, found[1:], strict=True))
    reached = max(sizes[key] / (seconds - overhead) for key, seconds in times.items() if key[1] == max(TOP_K))
    bandwidth = max(bandwidth, reached)
    return replace(
        device, bandwidth=bandwidth, efficiency=reached / bandwidth, overhead=overhead,
        rates={t: 1 / float(costs[t]) for t in (*LADDER, *OTHER_TYPES) if t in costs},
    )  # fmt: skip


def predictions(model: Inventory, device: Device, candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """Tokens per second by the model that searches use."""
    throughput = Throughput(Carry(model, model), device, CONTEXT)
    return {name: throughput.evaluate(c)["tokens_per_second"] for name, c in candidates.items()}


def plot(rows: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """Measured against predicted tokens/s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for key, label, mark in (("roofline", "bandwidth alone", "x"), ("predicted", "with rates by type", "o")):
        axes.plot([r[key] for r in rows.values()], [r["measured"] for r in rows.values()], mark, label=label)
    span = [0, 1.05 * max(r[key] for r in rows.values() for key in ("predicted", "measured", "roofline"))]
    axes.plot(span, span, color="gray", linewidth=0.8)
    axes.set(xlabel="predicted tokens/s", ylabel="measured tokens/s", title=title, xlim=span, ylim=span)
    axes.title.set_fontsize(9)
    axes.legend()
    with atomic(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def run(folder: Path, layers: int, threads: int, rounds: int) -> dict[str, Any]:
    """The three steps; what the JSON holds."""
    model = inventory(layers)
    clock = Clock.open(Files(model, folder), threads, rounds)
    peak = read_bandwidth(threads)
    keys = {f"{t}-top-{k}": (t, k) for t in (*LADDER, *OTHER_TYPES) for k in TOP_K}
    candidates = mixed(model)
    times = clock.measure({name: uniform(model, *key) for name, key in keys.items()} | candidates)
    blank = Device("this-machine", cpu(), 0, 0.0, "measured", cores=threads)
    device = fit(model, {key: times[name] for name, key in keys.items()}, peak, blank)
    wanted = predictions(model, device, candidates)
    roofline = predictions(model, replace(device, rates=None), candidates)
    rows = {
        name: {
            "predicted": wanted[name], "measured": 1 / times[name], "roofline": roofline[name],
            "error": wanted[name] * times[name] - 1, "roofline_error": roofline[name] * times[name] - 1,
        }
        for name in candidates
    }  # fmt: skip
    return {
        "cpu": device.title, "threads": threads, "llama.cpp": version(), "rounds": rounds,
        "parameters": model.parameters(), "bandwidth": device.bandwidth, "efficiency": device.efficiency,
        "overhead": device.overhead, "rates": device.rates,
        "uniform_milliseconds": {name: 1e3 * seconds for name, seconds in times.items() if name in keys},
        "spread": spread(clock.times.values()), "candidates": rows,
        "median_error": median(abs(r["error"]) for r in rows.values()),
        "largest_error": max(abs(r["error"]) for r in rows.values()),
        "roofline_median_error": median(abs(r["roofline_error"]) for r in rows.values()),
    }  # fmt: skip


def spread(times: Iterable[Sequence[float]]) -> float:
    """How noisy the machine was: half the range between quartiles over the median, of the median file."""
    quartiles = [np.percentile(t, (25, 50, 75)) for t in times]
    return float(median((high - low) / 2 / middle for low, middle, high in quartiles))


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: 4, 0.23B parameters)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures; a plot beside it")
    parser.add_argument("--rates", type=Path, help="file for one core's rates: spaces/decode_rates.json")
    args = parser.parse_args()
    for option, value in (("--layers", args.layers), ("--threads", args.threads), ("--rounds", args.rounds)):
        at_least(option, value, 1)
    args.folder.mkdir(parents=True, exist_ok=True)
    found = _rounded(run(args.folder, args.layers, args.threads, args.rounds))
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.json:
        write_text(args.json, text)
        title = f"{found['cpu']}, {found['threads']} threads; median error {found['median_error']:.1%}"
        plot(found["candidates"], title, args.json.with_suffix(".png"))
    if args.rates:
        per_core = {name: rate / args.threads for name, rate in found["rates"].items()}
        about = {key: found[key] for key in ("cpu", "threads", "llama.cpp")}
        write_text(args.rates, json.dumps({**about, "per_core": _rounded(per_core)}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
