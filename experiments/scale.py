"""docs/scale.md and its picture: `python -m experiments.scale docs/scale.md docs/pictures/scale.png`.

Made of the model of work (`search.scale`), the rates of experiments/results/scale_rates.json and the job times
of experiments/results/scale_trace.json; some minutes of simulation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.files import atomic, write_text
from experiments import scale_check
from experiments.scale_check import read
from experiments.scale_plans import (
    AS_IS,
    BUDGET,
    CHECKPOINT,
    FAILURES,
    FEWER_TYPES,
    GPU_SHARE,
    NODES,
    PREEMPTED,
    SEEDS,
    TRIALS,
    WAYS,
    Plan,
    Way,
    curves,
    end_of_scaling,
)
from search.scale.machines import CPU_NODE, GPU_NODE, LAPTOP
from search.scale.rates import Rates
from spaces.budget import format_size

Curves = Mapping[str, Mapping[int, float]]


def rates_text(found: Mapping[str, Any], rates: Rates) -> str:
    """What was measured here."""
    types = "\n".join(
        f"| {name} | {1e9 * row['quantize']:,.1f} | {1e9 * row['dequantize']:.2f} |"
        for name, row in sorted(found["types"].items(), key=lambda item: -item[1]["quantize"])
    )
    points = "; ".join(
        f"expert matrices of {int(size):,} weights: "
        + ", ".join(f"{flops / 1e9:.0f} ({rows:.0f})" for rows, flops in row)
        for size, row in found["blocks"].items()
    )
    filling, disk, products = found["filling"], found["disk"], found["products"]
    return f"""## Rates

`python -m experiments.scale_trace OUT --json experiments/results/scale_trace.json` runs the reference search and times
every job; `python -m experiments.scale_rates DIR --trace experiments/results/scale_trace.json --json
experiments/results/scale_rates.json --rates search/scale/rates.json` times the pieces. Measured {found["date"]} at commit
{found["commit"]} on {found["cpu"]}, one thread, in CPU seconds, as other programs ran beside it.

| type | into the bank, ns per weight | back, ns per weight |
|---|---|---|
{types}

* A decoder block, GFLOP/s (tokens for each expert at once): {points}. A large product reaches
  {products["one_thread"] / 1e9:.0f}.
* Checkpoint into a model: {1e9 * filling["BF16"]:.1f} ns per weight from bfloat16, {1e9 * filling["F8_E4M3"]:.1f} from float8.
* Comparing with the base model: {1e9 * found["logit"]:.1f} ns per logit. SHA-256: {found["hash"] / 1e9:.2f} GB/s. This disk: {disk["read"] / 1e9:.2f} GB/s
  read, {disk["write"] / 1e9:.2f} GB/s written.
* Of trials, {rates.shares[1]:.0%} reach the second rung and {rates.shares[2]:.0%} the third; the driver takes {rates.trial:.2f} s a trial; job times
  spread by {rates.spread:.2f} (standard deviation of the logarithm), which is what stragglers are drawn with.

A core of another machine is taken to be as fast; nobody publishes that figure."""


def work_text(plan: Plan) -> str:
    """Bytes and FLOP of every stage."""
    study = plan.study(AS_IS)
    rows = "\n".join(
        f"| {s.name} | {sum(len(w.jobs) for w in s.waves):,} | {format_size(s.work.read)} | {format_size(s.work.written)} | "
        f"{s.work.weights / 1e12:,.1f} | {s.work.flop / 1e15:,.1f} | {s.work.seconds / 3600:,.0f} |"
        for s in study.stages(8)
    )
    bank, fewer = study.model.bank_bytes(), plan.study(WAYS[-1]).model.bank_bytes()
    return f"""## The work

Searched directly at {BUDGET // 10**9} GB with {TRIALS} trials and 8 workers, all {len(study.model.space.ladder(plan.inventory.quantizable[0]))} types:

| stage | jobs | read | written | dequantized, 1e12 weights | compute, PFLOP | core hours |
|---|---|---|---|---|---|---|
{rows}

* The model is streamed: a pass over it reads {format_size(CHECKPOINT)} (as published, in float8) and fills one layer at a time; gradients and
  repairs need it in memory and are left out.
* The bank takes **{format_size(bank)}** of disk, {format_size(fewer)} with `--types {",".join(FEWER_TYPES)}`.
* A worker takes {format_size(plan.worker)} of memory: a layer in float32, the embedding and the output matrix. Quantization and
  export stay below 5 GB a process ([streaming](streaming.md)).
* Compute is 2 FLOP for every weight that a token meets. Most of it is in the option costs, where {len(study.stages(8)[2].waves[0].jobs) + len(study.stages(8)[2].waves[1].jobs)} jobs measure 16
  options each on 2,048 tokens, and in trials; quantization, where the types whose quantizers search take the most, is core hours without any."""


def machines_text(plan: Plan) -> str:
    """Hours per stage of the three plans."""
    plans = {
        "(a) laptop": (LAPTOP, 1), "(b) GPU node": (GPU_NODE, 1), "(c) 32 CPU nodes": (CPU_NODE, 32),
        "(c) 32 GPU nodes": (GPU_NODE, 32),
    }  # fmt: skip
    runs = {name: plan.run(*where) for name, where in plans.items()}
    threaded = {name: plan.run(*where, Way("", threads=True)) for name, where in plans.items()}
    names = list(runs["(a) laptop"].seconds)
    rows = "\n".join(
        f"| {stage} | "
        + " | ".join(f"{run.seconds[stage] / 3600:,.1f}" for run in runs.values())
        + f" | {plan.on_gpus(stage):,.2f} |"
        for stage in names
    )
    whole = " | ".join(f"**{run.hours:,.0f}**" for run in runs.values())
    gpu = sum(plan.on_gpus(stage) for stage in names)
    with_threads = " | ".join(f"{run.hours:,.0f}" for run in threaded.values())
    cost = " | ".join(f"{n * m.price * runs[name].hours:,.0f}" for name, (m, n) in plans.items())
    about = "\n".join(
        f"| {m.title} | {m.cores} | {format_size(m.memory)} | {plan.workers(m)} ({format_size(plan.memory(m))}) | "
        f"{m.reading / 1e9:.1f} GB/s | {m.network / 1e9:.1f} GB/s | {m.price:.2f} | {m.source} |"
        for m in (LAPTOP, GPU_NODE, CPU_NODE)
    )
    return f"""## Three plans

| machine | cores | memory | workers that fit | disk | network | $ an hour | source |
|---|---|---|---|---|---|---|---|
{about}

What today's code uses: workers of one thread each, as many as a layer in float32 fits into memory; **no GPU**, in any stage.
So most cores of these machines idle. Hours:

| stage | {" | ".join(plans)} | (b) if its GPUs were used |
|---|---|---|---|---|---|
{rows}
| all | {whole} | **{gpu:,.0f}** |
| all, if workers used every core | {with_threads} | |
| dollars, as it is | {cost} | {gpu * GPU_NODE.price:,.0f} |

* **(a)** is no plan: {runs["(a) laptop"].hours / 24:,.0f} days. Search a model that fits into memory and carry its decisions to DeepSeek-V3 by role
  and depth (`--target`), as the README's example does in a quarter of an hour; DeepSeek-V3 itself is then pruned and quantized
  once, by the recipe. With a bank of five types and threads it would still be {plan.run(LAPTOP, 1, WAYS[-1]).hours / 24:,.0f} days.
* **(b)** is bound by one layer per worker in host memory, {plan.workers(GPU_NODE)} of {GPU_NODE.cores} cores. The last column is what the GPUs would make of
  it at {GPU_SHARE:.0%} of their dense bfloat16 rate, {format_size(GPU_NODE.reading)}/s of disk and quantization on all cores.
* **(c)** ends where the calibration, one job on one thread, and the rounds of trials do not divide any further."""


def scaling_text(plan: Plan, found: Curves) -> str:
    """Nodes, hours, cost, and where it ends."""
    base = found[AS_IS.title]
    rows = []
    for n, hours in base.items():
        runs = [plan.run(CPU_NODE, n, seed=s) for s in range(SEEDS)]
        lent = plan.hours(CPU_NODE, n, failures=PREEMPTED)
        lost = sum(r.lost for r in runs) / SEEDS
        rows.append(
            f"| {n} | {n * plan.workers(CPU_NODE)} | {hours:,.0f} | {n * hours * CPU_NODE.price:,.0f} | "
            f"{base[1] / n / hours:.0%} | {lost:.1f} | {lent:,.0f} |"
        )
    ends = "\n".join(
        f"| {way.title} | {hours[1]:,.0f} | {hours[8]:,.0f} | {hours[64]:,.0f} | {end_of_scaling(hours)} | "
        f"{hours[end_of_scaling(hours)]:,.0f} | {end_of_scaling(hours) * CPU_NODE.price * hours[end_of_scaling(hours)]:,.0f} |"
        for way in WAYS
        for hours in [found[way.title]]
    )
    stages = sorted(plan.run(CPU_NODE, NODES[-1]).seconds.items(), key=lambda item: -item[1])
    where = ", ".join(f"{name} {seconds / 3600:,.0f}" for name, seconds in stages[:5])
    return f"""## One to 64 nodes

A discrete simulation of the Ray study (`search/scale/simulate.py`): jobs in the pool's order on whichever worker is free,
a barrier after every wave, stragglers with the measured spread, jobs lost to Poisson failures and dealt again after 30 s, the
checkpoint and the variants a candidate uses sent from the driver's node one after the other. Nodes are the CPU nodes above,
failures {FAILURES:.1e} an hour and node (Llama 3's report: 419 in 54 days of 16,384 GPUs), mean of {SEEDS} seeds:

| nodes | workers | hours | $ | efficiency | jobs lost | hours if a node is taken away once a day |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Scaling ends at **{end_of_scaling(base)} nodes**: from there twice as many take off less than a tenth. What would move the end:

| | hours, 1 node | 8 nodes | 64 nodes | ends at nodes | hours there | $ there |
|---|---|---|---|---|---|---|
{ends}

![Hours and dollars by nodes](pictures/scale.png)

*Rounds of 64* and *no rounds* let more than 8 workers score trials at a time; the first asks the sampler for more before it
learns, and the second changes results with the number of workers, which today they do not depend on. *Threads* gives every
worker the cores that its node has for it (perfectly, up to the memory's bandwidth); it helps wherever one job is waited for.
*Five types* makes the bank small and quantization quick, and leaves the trials as they are.

At {NODES[-1]} nodes as it is, the hours are: {where}. A stage of one or two jobs takes as long on any number of
nodes."""


def checks_text(trace: Mapping[str, Any], rates: Rates) -> str:
    """Reckoned against measured."""
    stages = scale_check.by_stage(trace, rates)
    whole = {"all": tuple(map(sum, zip(*stages.values(), strict=True)))}
    return f"""## How wrong is it?

The reference search ({trace["trials"]} trials, one worker), reckoned from rates and sizes, against its CPU seconds job by job:

{scale_check.table({**stages, **whole}, "stage")}

The simulated trial stage, from job times measured with one worker, against the clock (`experiments/results/workers.json`, an
earlier version of the search on the same kind of machine):

{scale_check.table(scale_check.by_workers(trace), "workers")}

The 31 GB checkpoint of [streaming](streaming.md), streamed on two cores that other work shared, disk included in what was
measured and not in what is reckoned:

{scale_check.table(scale_check.by_streaming(rates), "stage")}

Not in the model: attention between tokens (below 2 % of a block at 256 tokens), the time of llama.cpp, the start of processes,
and pages of files that stay in memory between jobs. A quarter of the experts is taken as pruned in every candidate, and types
as drawn at random. No figure of DeepSeek-V3 was measured. What is fitted to the reference run itself, and so no prediction
there: seconds of a trial in the driver, shares of trials by rung, tokens of an lm-eval item, seconds per weight of error feedback
and of projecting gradients."""


def picture(found: Curves, path: Path) -> None:
    """Hours and dollars by nodes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(8, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for way in WAYS:
        hours = found[way.title]
        for axes, scale in ((left, lambda n: 1.0), (right, lambda n: n * CPU_NODE.price)):
            axes.plot(
                list(hours), [h * scale(n) for n, h in hours.items()], "o-", markersize=4, label=way.title
            )
    for axes, label in ((left, "hours"), (right, "US dollars")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(NODES, [str(n) for n in NODES])
        axes.set_xlabel("CPU nodes")
        axes.set_title(label, fontsize=11)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    with atomic(path) as stream:
        figure.savefig(stream, format="png", dpi=100)


def page(found: Curves, plan: Plan) -> str:
    """The whole page."""
    head = """# The real size, on paper

What a search of DeepSeek-V3 itself would take, stage by stage, from rates measured on the reference model's machine, the sizes
of its tensors and published rates of machines; nothing of this size was run. `python -m search.run --dry-run` prints the same
reckoning for a model of yours on the machine it runs on. Made by `python -m experiments.scale docs/scale.md
docs/pictures/scale.png`."""
    trace = read("scale_trace.json")
    return (
        "\n\n".join(
            [
                head,
                machines_text(plan),
                scaling_text(plan, found),
                work_text(plan),
                rates_text(read("scale_rates.json"), plan.rates),
                checks_text(trace, plan.rates),
            ]
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    plan = Plan(Rates.of(read("scale_rates.json")))
    found = curves(plan)
    picture(found, args.picture)
    write_text(args.page, page(found, plan))


if __name__ == "__main__":
    main()
