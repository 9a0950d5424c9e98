"""Runs jobs on workers: in this process, or on Ray actors of one thread each (`search.ray_pool`).

A job is (method, arguments) of `search.worker.Worker`. A worker that dies costs
its running job a retry, never the study; an error the job itself raises is
raised here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from search.machine_memory import peak_resident
from search.worker import Setup, Worker

Job = tuple[str, tuple[Any, ...]]


class Pool(Protocol):
    """Runs jobs of workers."""

    @property
    def size(self) -> int:
        """Workers there are."""

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        """Results in the order of the jobs; `on_result` sees each (position, result) as it comes."""

    def broadcast(self, method: str, *args: Any) -> None:
        """Runs a job once on every worker before its next one, and on those that start later."""

    def close(self) -> None:
        """Stops the workers."""


class LocalPool:
    """One worker in this process."""

    size = 1

    def __init__(self, setup: Setup) -> None:
        self.worker = Worker(setup)

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        results = []
        for i, (method, args) in enumerate(jobs):
            results.append(getattr(self.worker, method)(*args))
            on_result(i, results[-1])
        return results

    def broadcast(self, method: str, *args: Any) -> None:
        getattr(self.worker, method)(*args)

    def close(self) -> None:
        pass


def make_pool(setup: Setup, workers: int, address: str | None) -> Pool:
    """Ray actors, or this process for 0 workers."""
    if workers == 0:
        return LocalPool(setup)
    from search.ray_pool import RayPool

    return RayPool(setup, workers, address)


def peak_memory(pool: Pool) -> int:
    """Largest resident size among this process and the workers so far, bytes."""
    return max([peak_resident(), *pool.run([("peak_memory", ())] * pool.size)])
