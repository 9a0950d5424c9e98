"""What a search will take on this machine, from headers alone: what `--dry-run` prints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compression.gguf_file import GgufFile
from search.machine_memory import free_memory
from search.memory import Plan, make_plan, run_bytes, worker_bytes
from search.options import Options
from search.problem import Problem
from search.scale.machines import UNKNOWN_DISK, Machine, cached, this_machine
from search.scale.rates import Rates, measured
from search.scale.simulate import Cluster, simulate
from search.scale.stages import Stage, Study
from search.scale.work import Model
from spaces.budget import format_size
from spaces.carry import Carry
from spaces.errors import UserError
from spaces.inventory import Inventory
from spaces.quant_types import LADDER
from spaces.space import Space

_FLOAT8 = 1.5  # bytes per weight, below which a checkpoint's numbers are float8
_BASELINES = 4  # the paper's rules, the knapsack's optima


def stand_in(inventory: Inventory, runtime: str, types: tuple[str, ...]) -> Space:
    """A space as large as the one that calibration will make: three rankings and a table of sets."""
    experts = inventory.experts
    up = tuple(range(experts))
    odd, even = (*up[1::2], *up[::2]), (*up[::2], *up[1::2])
    rankings = {"reap": up, "mass": up[::-1], "paper": odd}
    layers = inventory.moe_layers
    bare = Space(inventory, {c: dict.fromkeys(layers, r) for c, r in rankings.items()}, runtime, types)
    sets = {n: tuple(sorted(even[:n])) for n in bare.kept_options}
    return Space(inventory, bare.rankings, runtime, types, dict.fromkeys(layers, sets))


def checkpoint_bytes(path: Path) -> int:
    """Bytes of a checkpoint's weight files: of a folder's shards, of all parts of a GGUF file."""
    files = list(path.glob("*.safetensors")) if path.is_dir() else GgufFile.open(path).files
    return sum(f.stat().st_size for f in files)


def make_study(problem: Problem, options: Options, stream: bool, checkpoint: int, rates: Rates) -> Study:
    """What a search of these options does.

    Args:
        problem: Inventories and budget.
        options: Of the command.
        stream: Whether the model is streamed.
        checkpoint: Bytes of its files.
        rates: Of a core.
    """
    source, target = problem.source, problem.target
    whole = [i.file_bytes(i.uniform_plan("BF16")) for i in (source, target)]
    kind = "F8_E4M3" if checkpoint < _FLOAT8 * source.parameters() else "BF16"
    space = stand_in(source, options.runtime, problem.types)
    candidate = problem.budget.limit * whole[0] // whole[1]
    model = Model(space, rates, stream, checkpoint, kind, candidate)
    carry, smallest = Carry(source, target), LADDER[0]
    fitting = [
        n
        for n in space.kept_options
        if target.file_bytes(carry.plan(source.uniform_plan(smallest, n))) <= problem.budget.limit
    ]
    items = options.limit * len(options.tasks)
    baselines = min(options.trials, _BASELINES + len(fitting))
    return Study(model, options.trials, baselines, items, options.repair == "auto", options.export)


@dataclass(frozen=True)
class Estimate:
    """What a search takes.

    Attributes:
        stages: In order.
        seconds: Of each, by the clock.
        plan: Workers, and whether they stream.
        memory: Largest resident size of a process, bytes.
        run_memory: Of all processes together.
        bank: Bytes of the bank.
        place: The folder that the bank goes to, or the nearest one above it that is there.
        machine: The machine at hand; its memory and disk are what is free.
        cpu: The processor that rates are of.
        warnings: A line for each thing that does not fit.
    """

    stages: Sequence[Stage]
    seconds: dict[str, float]
    plan: Plan
    memory: int
    run_memory: int
    bank: int
    place: Path
    machine: Machine
    cpu: str
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """A table of stages, and what it rests on."""
        head = ("stage", "read", "written", "dequantized", "compute", "core hours", "time")
        rows = [head, *(self._row(stage) for stage in self.stages)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        how = "streamed layer by layer" if self.plan.stream else "in memory"
        known = self.machine.reading == float("inf")
        disk = "files stay in memory" if known else f"a disk taken to read {format_size(UNKNOWN_DISK)}/s"
        return [
            *table,
            f"in all {_time(sum(self.seconds.values()))} with {_count(max(1, self.plan.workers))} of one "
            f"thread ({self.machine.cores} cores here, {disk}), the model {how}",
            f"rates are of one core of {self.cpu}: expect a factor of 2",
            f"memory: {format_size(self.memory)} in the largest process, {format_size(self.run_memory)} in "
            f"all; {format_size(self.machine.memory)} are free",
            f"bank: {format_size(self.bank)} in {self.place}; {format_size(self.machine.disk)} are free "
            "there",
            *self.warnings,
        ]

    def _row(self, stage: Stage) -> tuple[str, ...]:
        work = stage.work
        return (
            stage.name,
            format_size(work.read),
            format_size(work.written),
            f"{work.weights / 1e9:,.2f}e9",
            f"{work.flop / 1e12:,.1f} TFLOP",
            f"{work.seconds / 3600:,.2f}",
            _time(self.seconds[stage.name]),
        )


def estimate(problem: Problem, options: Options) -> Estimate:
    """The estimate for this machine; reads the sizes of files, no weights."""
    source, warnings = problem.source, []
    try:
        elsewhere = options.ray_address is not None
        plan = make_plan(
            source, options.workers, options.stream, options.types,
            elsewhere=elsewhere, fewer=options.fewer_workers,
        )  # fmt: skip
    except UserError as error:
        warnings.append(f"warning: {error}")
        plan = Plan(options.workers, True, 0)
    workers = max(1, plan.workers)
    study = make_study(problem, options, plan.stream, checkpoint_bytes(options.model), measured())
    bank, place = study.model.bank_bytes(), _existing(options.out)
    machine = this_machine(os.cpu_count() or 1, free_memory(), shutil.disk_usage(place).free)
    there = sum(f.stat().st_size for f in (options.out / "cache" / "bank").rglob("*.q"))
    if bank - there > machine.disk:
        warnings.append("warning: the bank does not fit there; give --out on a larger disk, or fewer --types")
    run_memory = run_bytes(source, plan.workers, plan.stream, plan.cache_bytes)
    if study.model.checkpoint + bank + run_memory < machine.memory:
        machine = cached(machine)
    stages = study.stages(workers)
    account = simulate(Cluster(machine, 1, workers, 0.0), lambda _: stages)
    largest = run_memory if plan.workers == 0 else worker_bytes(source, plan.stream, plan.cache_bytes)
    return Estimate(
        stages, account.seconds, plan, largest, run_memory, bank, place, machine, study.model.rates.cpu,
        tuple(warnings),
    )  # fmt: skip


def estimate_lines(problem: Problem, options: Options) -> list[str]:
    """What `--dry-run` prints."""
    return estimate(problem, options).lines()


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def _count(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
