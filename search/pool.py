"""Runs jobs on workers: in this process, or on Ray actors of one thread each.

A job is (method, arguments) of `search.worker.Worker`. A worker that dies costs
its running job a retry, never the study; an error the job itself raises is
raised here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from search.worker import Setup, Worker
from spaces.errors import UserError

Job = tuple[str, tuple[Any, ...]]
_RETRIES = 3


class Pool(Protocol):
    """Runs jobs of workers."""

    size: int

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        """Results in the order of the jobs; `on_result` sees each (position, result) as it comes."""

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Runs a job once on every worker, and on those that start later."""

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

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    def close(self) -> None:
        pass


def _check_reachable(address: str) -> None:
    """A dead address makes `ray.init` hang; a closed port is found at once."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--ray-address {address!r} must be HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({error})") from error


class RayPool:
    """Workers as Ray actors.

    Args:
        setup: What every worker is made of.
        workers: Actors to start.
        address: A cluster to join; None starts one on this machine.
        kind: Class of the workers; its methods are the jobs.
    """

    def __init__(
        self, setup: Setup, workers: int, address: str | None = None, kind: Callable[[Setup], Any] = Worker
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Workers are what the study is about: Ray would let everything else go first.
        os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        self.setup, self.size, self.kind, self._ray = setup, workers, kind, ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is not None:
            _check_reachable(address)
        try:
            if address is None:
                # OpenMP threads that spin while they wait starve the other workers.
                root = str(Path(__file__).resolve().parent.parent)
                paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
                env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": paths}
                ray.init(
                    num_cpus=workers,
                    include_dashboard=False,
                    object_store_memory=128 * 2**20,
                    runtime_env={"env_vars": env},
                    **quiet,
                )
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"Ray cannot be started ({str(error)[:200]})") from error
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < workers:
            self.close()
            raise UserError(f"--workers {workers}: the Ray cluster has {cpus} CPUs; use at most that many")
        self._broadcasts: list[Job] = []
        self._actors = [self._start() for _ in range(workers)]

    def _start(self) -> Any:
        actor = self._ray.remote(num_cpus=1, max_restarts=0)(self.kind).remote(self.setup)
        for method, args in self._broadcasts:
            getattr(actor, method).remote(*args)
        return actor

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        waiting = [(i, 0) for i in range(len(jobs) - 1, -1, -1)]
        idle = list(range(len(self._actors)))
        running: dict[Any, tuple[int, int, int]] = {}
        while waiting or running:
            while waiting and idle:
                (i, tries), slot = waiting.pop(), idle.pop()
                method, args = jobs[i]
                running[getattr(self._actors[slot], method).remote(*args)] = (i, tries, slot)
            done, _ = self._ray.wait(list(running), num_returns=1)
            i, tries, slot = running.pop(done[0])
            try:
                results[i] = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except self._ray.exceptions.RayError as error:
                if tries + 1 >= _RETRIES:
                    raise UserError(
                        f"a worker died {_RETRIES} times at the same job ({jobs[i][0]}: {str(error)[:150]}); "
                        "is there enough memory? try fewer --workers, then run the same command again"
                    ) from error
                self._actors[slot] = self._start()
                waiting.append((i, tries + 1))
            else:
                on_result(i, results[i])
            idle.append(slot)
        return results

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        self._broadcasts.append((method, args))
        return list(self._ray.get([getattr(a, method).remote(*args) for a in self._actors]))

    def close(self) -> None:
        self._ray.shutdown()


def make_pool(setup: Setup, workers: int, address: str | None) -> Pool:
    """Ray actors, or this process for 0 workers."""
    if workers == 0:
        return LocalPool(setup)
    return RayPool(setup, workers, address)


def peak_memory(pool: Pool) -> int:
    """Largest resident size among this process and the workers so far, bytes."""
    import resource

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max([own, *pool.run([("peak_memory", ())] * pool.size)])
