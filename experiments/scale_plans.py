"""DeepSeek-V3 on paper: its work, the ways to search it, and the clusters that are simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import mean

from compression.checkpoint import open_target
from search.memory import run_bytes, worker_bytes
from search.scale.estimate import stand_in
from search.scale.machines import CPU_NODE, GPU_NODE, Machine
from search.scale.rates import Rates
from search.scale.simulate import Account, Cluster, simulate
from search.scale.stages import Study
from search.scale.work import Model

CHECKPOINT = 688_000_000_000
"""Bytes of DeepSeek-V3's files as published, in float8 (model card: 671B weights, 14B of another layer)."""

BUDGET, TRIALS, BASELINES, ITEMS = 103 * 10**9, 160, 16, 300
FEWER_TYPES = ("IQ1_M", "Q2_K", "Q3_K", "Q4_K", "Q6_K")
NODES = (1, 2, 4, 8, 16, 32, 64)
SEEDS = 3
FAILURES = 419 / (54 * 24 * 16384 / 8)
"""Of a node, per hour: Llama 3's 419 unexpected interruptions in 54 days of 16,384 GPUs, 8 a node."""

PREEMPTED = 1 / 24
"""Of a node that is lent until somebody pays more, per hour: an assumption."""

GPUS, GPU_FLOPS, GPU_BANDWIDTH, GPU_SHARE = 8, 989e12, 3.35e12, 0.4
"""NVIDIA H100 SXM data sheet: dense bfloat16 and memory; the share that is reached is an assumption."""


@dataclass(frozen=True)
class Way:
    """A way to search: as the code is, or as it might be.

    Attributes:
        title: In tables.
        round: Trials of a round, 0 without.
        threads: Whether a worker uses all cores that its node has for it.
        types: The only types; () for all.
    """

    title: str
    round: int = 8
    threads: bool = False
    types: tuple[str, ...] = ()


AS_IS = Way("as it is")
WAYS = (
    AS_IS,
    Way("rounds of 64", round=64),
    Way("no rounds", round=0),
    Way("threads", threads=True),
    Way("threads, no rounds", round=0, threads=True),
    Way("five types", types=FEWER_TYPES),
    Way("five types, threads, no rounds", round=0, threads=True, types=FEWER_TYPES),
)


class Plan:
    """DeepSeek-V3, streamed.

    Args:
        rates: Of a core.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates, self.inventory = rates, open_target("deepseek-v3")

    def study(self, way: Way) -> Study:
        space = stand_in(self.inventory, "any", way.types)
        model = Model(space, self.rates, True, CHECKPOINT, "F8_E4M3", BUDGET)
        return Study(model, TRIALS, BASELINES, ITEMS, round=way.round)

    @cached_property
    def worker(self) -> int:
        """Bytes of a worker."""
        return worker_bytes(self.inventory, True)

    def workers(self, machine: Machine) -> int:
        return machine.workers(self.inventory, True)

    def memory(self, machine: Machine) -> int:
        """Bytes of all workers of a node."""
        return run_bytes(self.inventory, self.workers(machine), True)

    def run(
        self, machine: Machine, nodes: int, way: Way = AS_IS, failures: float = FAILURES, seed: int = 0
    ) -> Account:
        """One simulated study."""
        workers = self.workers(machine)
        if way.threads:
            machine = replace(machine, core=machine.core * max(1, machine.cores // workers))
        cluster = Cluster(machine, nodes, workers, self.rates.spread, failures, checkpoint=CHECKPOINT)
        study = self.study(way)
        return simulate(cluster, lambda count: study.stages(count, seed), seed)

    def hours(self, machine: Machine, nodes: int, way: Way = AS_IS, failures: float = FAILURES) -> float:
        """Mean hours over seeds."""
        return mean(self.run(machine, nodes, way, failures, seed).hours for seed in range(SEEDS))

    def on_gpus(self, stage: str) -> float:
        """Hours of a stage on the GPU node if its work, but for quantization, were done by the GPUs."""
        work = next(s for s in self.study(AS_IS).stages(GPUS) if s.name == stage).work
        if stage == "quantization":
            return work.seconds / GPU_NODE.cores / 3600 + work.read / GPU_NODE.reading / 3600
        compute = work.flop / (GPUS * GPU_FLOPS * GPU_SHARE)
        moved = work.traffic / (GPUS * GPU_BANDWIDTH)
        return (max(compute, moved) + (work.read + work.written) / GPU_NODE.reading) / 3600


def end_of_scaling(hours: Mapping[int, float]) -> int:
    """Nodes from which on twice as many take off less than a tenth of the hours."""
    counts = sorted(hours)
    for one, two in pairwise(counts):
        if hours[two] > 0.9 * hours[one]:
            return one
    return counts[-1]


def curves(plan: Plan, ways: Sequence[Way] = WAYS) -> dict[str, dict[int, float]]:
    """Way to hours by number of CPU nodes."""
    return {way.title: {n: plan.hours(CPU_NODE, n, way) for n in NODES} for way in ways}
