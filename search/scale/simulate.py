"""The Ray study as a discrete simulation: nodes, workers, stragglers, failures, transfers, barriers.

Every wave of jobs is dealt in order to whichever worker is free first, as the pool does; the next wave begins
when its last job is done. Seeded: the same arguments give the same hours.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from search.scale.machines import Machine
from search.scale.stages import Stage, Wave
from search.scale.work import Work


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind.

    Attributes:
        machine: Each of them; the first is the driver's, whose disk the others do not see.
        nodes: How many.
        workers: Of each node.
        spread: Standard deviation of the logarithm of a job's time over what its work says.
        failures: Of a node, per hour.
        restart: Seconds until a node's workers work again.
        checkpoint: Bytes that every other node is sent before its first job.
    """

    machine: Machine
    nodes: int
    workers: int
    spread: float
    failures: float = 0.0
    restart: float = 30.0
    checkpoint: int = 0


@dataclass
class Account:
    """What a simulated study took.

    Attributes:
        seconds: Of every stage, by the clock.
        busy: Seconds of work of all workers.
        lost: Jobs that a failure of their node cost.
        hours: In all.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    lost: int = 0

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600


class _Node:
    """When a node fails, drawn as far as it is asked for."""

    def __init__(self, rate: float, rng: random.Random) -> None:
        self._rate, self._rng = rate / 3600, rng
        self._at = self._draw(0.0)

    def _draw(self, after: float) -> float:
        return after + self._rng.expovariate(self._rate) if self._rate else float("inf")

    def fails_within(self, begin: float, end: float) -> float | None:
        """The first failure in a span; spans are asked for with rising begins, nearly."""
        while self._at <= begin:
            self._at = self._draw(self._at)
        return self._at if self._at < end else None


class Simulation:
    """One study on one cluster.

    Args:
        cluster: Where.
        seed: Of stragglers and failures.
    """

    def __init__(self, cluster: Cluster, seed: int = 0) -> None:
        self.cluster, self.rng = cluster, random.Random(seed)
        self.nodes = [_Node(cluster.failures, random.Random(f"{seed} {n}")) for n in range(cluster.nodes)]
        self.account = Account()
        self._link = 0.0  # when the driver's network is free again
        self._copied = {0}  # nodes that have the checkpoint
        self._now = 0.0

    def run(self, stages: Sequence[Stage]) -> Account:
        """All stages."""
        for stage in stages:
            begun = self._now
            for wave in stage.waves:
                self._now += wave.driver / self.cluster.machine.core
                self._wave(wave)
            self.account.seconds[stage.name] = self._now - begun
        return self.account

    def _wave(self, wave: Wave) -> None:
        """Deals jobs to free workers; a lost one is dealt again."""
        cluster = self.cluster
        # The pool's order; neighbours on the list of workers are on different nodes.
        free = [(self._now, w) for w in range(cluster.nodes * cluster.workers)][: max(1, len(wave.jobs))]
        heapq.heapify(free)
        busy = -(-min(len(wave.jobs), cluster.nodes * cluster.workers) // cluster.nodes)
        waiting = [(self._now, i) for i in range(len(wave.jobs))]
        heapq.heapify(waiting)
        end = self._now
        while waiting:
            ready, i = heapq.heappop(waiting)
            at, worker = heapq.heappop(free)
            node = worker % cluster.nodes
            begun = max(ready, at)
            done = self._send(begun, wave.jobs[i], node) + self._seconds(wave.jobs[i], busy)
            failed = self.nodes[node].fails_within(begun, done)
            if failed is None:
                self.account.busy += done - begun
                end = max(end, done)
                heapq.heappush(free, (done, worker))
            else:
                self.account.lost += 1
                heapq.heappush(waiting, (failed, i))
                heapq.heappush(free, (failed + cluster.restart, worker))
        self._now = end

    def _seconds(self, job: Work, busy: int) -> float:
        """A job's time, with so many workers of the node at work beside each other."""
        machine = self.cluster.machine
        disk = job.read / (machine.reading / busy) + job.written / (machine.writing / busy)
        straggle = self.rng.lognormvariate(-(self.cluster.spread**2) / 2, self.cluster.spread)
        # Rates were measured with the memory for one core alone; many share it.
        computing = job.seconds / machine.core * max(1.0, busy / machine.cores)
        work = max(computing, job.traffic * busy / machine.bandwidth)
        return work * straggle + disk

    def _send(self, begun: float, job: Work, node: int) -> float:
        """When a job on a node can begin: what it needs is sent, and what it makes is reckoned at once.

        The driver's network carries one thing after the other.
        """
        if not node:
            return begun
        size = job.fetched + job.written
        if node not in self._copied:
            self._copied.add(node)
            size += self.cluster.checkpoint
        if not size:
            return begun
        self._link = max(self._link, begun) + size / self.cluster.machine.network
        return self._link


def simulate(cluster: Cluster, stages: Callable[[int], Sequence[Stage]], seed: int = 0) -> Account:
    """One study; `stages` makes its jobs for a number of workers."""
    return Simulation(cluster, seed).run(stages(cluster.nodes * cluster.workers))
