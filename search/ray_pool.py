"""A pool of Ray actors: a worker that dies, with its node or alone, costs its running job a retry."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.cluster import places
from search.cluster.seat import Home
from search.cluster.served import Served
from search.cluster.session import Session
from search.cluster.staff import Member, Staff
from search.console import console
from search.pool import Job
from search.worker import Setup, Worker
from spaces.errors import UserError

_RETRIES = 3
_MISSES = 15  # tries to get a job's files, a tick apart: longer than a dead cluster goes unnoticed
_RESTARTS = 8  # of a local Ray in one run
_TICK = 2.0  # seconds between looks at the cluster
_STARTING = 300.0  # seconds without any worker after which there will be none
_TO_CLEAN = 15.0
# How Ray words the end of an actor whose node is gone.
_NODE_LEFT = re.compile("node has died|owner has died")
_AGAIN = "then run the same command again: it goes on where it was"


@dataclass
class _Task:
    """A job on its way.

    Attributes:
        place: Its place among the jobs.
        deaths: How often a worker died of it.
        misses: How often its files did not arrive.
    """

    place: int
    deaths: int = 0
    misses: int = 0


class RayPool:
    """Workers as Ray actors.

    Jobs that the workers' class names in `anywhere` run on every node; all others read or write files
    that only the driver's disk has, and go to workers that see it.

    Args:
        setup: What every worker is made of.
        workers: How many to have while there are CPUs for them.
        address: A cluster to join; None starts Ray on this machine.
        kind: Class of the workers; its methods are the jobs.

    Raises:
        UserError: Ray cannot be started or joined.
    """

    def __init__(
        self, setup: Setup, workers: int, address: str | None = None, kind: Callable[..., Any] = Worker
    ) -> None:
        self.session = Session(workers, address)
        import ray

        self._ray: Any = ray
        self._anywhere = frozenset(getattr(kind, "anywhere", ()))
        self._broadcasts: list[Job] = []
        self._restarts = 0
        try:
            home, files = None, None
            if address is not None:
                served = Served(Path(setup.checkpoint), Path(setup.cache))
                home, files = Home.of(served), self._serve(served)
            self.staff = Staff(self.session, workers, (kind, setup, home, files))
            self.staff.tend()
        except BaseException:
            self.session.close()
            raise

    def _serve(self, served: Served) -> Any:
        """The file server's actor, on the driver's node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from search.cluster.file_server import FileServer

        here = NodeAffinitySchedulingStrategy(self.session.node, soft=False)
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_concurrency": 8,
            "max_restarts": 5,
            "max_task_retries": 5,
        }
        return self._ray.remote(**options, scheduling_strategy=here)(FileServer).remote(served)

    @property
    def size(self) -> int:
        """Workers there are now, at least one."""
        return max(1, len(self.staff.members))

    def run(
        self, jobs: Sequence[Job], on_result: Callable[[int, Any], None] = lambda i, result: None
    ) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        waiting = [_Task(i) for i in range(len(jobs))]
        running: dict[Any, tuple[_Task, Member, int]] = {}
        looked, alive = 0.0, time.monotonic()
        while waiting or running:
            now = time.monotonic()
            if now - looked > _TICK:
                looked = now
                if self.session.dead():
                    self._revive()
                    waiting[:0] = [task for task, _, _ in running.values()]
                    running.clear()
                    alive = time.monotonic()
                self.staff.tend()
            self._assign(jobs, waiting, running)
            starting = [m.arriving for m in self.staff.members if m.arrival is None]
            if running or now - alive < _STARTING:
                alive = now if running else alive
            else:
                raise UserError(
                    f"no worker could start for {_STARTING:.0f} s; start nodes or free CPUs of the "
                    f"cluster (ray status shows them), {_AGAIN}"
                )
            done, _ = self._ray.wait([*running, *starting], num_returns=1, timeout=_TICK)
            for ref in done:
                if ref not in running:
                    self.staff.tend()
                    continue
                task, member, told = running.pop(ref)
                member.busy = False
                try:
                    results[task.place] = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, self._ray.exceptions.RayError):
                        raise (error.cause if isinstance(error.cause, Exception) else error) from None
                    self._miss(task, error.cause)
                    member.told = told  # it may have missed before it heard what was broadcast
                    waiting.insert(0, task)
                except self._ray.exceptions.RayError as error:
                    self._bury(member, task, jobs[task.place][0], error)
                    waiting.insert(0, task)
                    looked = 0.0
                else:
                    on_result(task.place, results[task.place])
        return results

    def _assign(
        self, jobs: Sequence[Job], waiting: list[_Task], running: dict[Any, tuple[_Task, Member, int]]
    ) -> None:
        """Gives idle workers jobs that they can do."""
        for member in self.staff.members:
            if member.busy or member.arrival is None:
                continue
            home = member.arrival.home
            task = next((t for t in waiting if home or jobs[t.place][0] in self._anywhere), None)
            if task is None:
                continue
            waiting.remove(task)
            told, member.told = member.told, len(self._broadcasts)
            member.busy = True
            ref = member.actor.run.remote(jobs[task.place], self._broadcasts[told:])
            running[ref] = (task, member, told)

    def _bury(self, member: Member, task: _Task, method: str, error: Exception) -> None:
        """Notes a death; a job that workers die of is given up, one that a node took along is not."""
        text = str(error)
        self.staff.bury(member)
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            if self.staff.fewer():
                return
        elif _NODE_LEFT.search(text):
            return
        task.deaths += 1
        if task.deaths >= _RETRIES:
            raise UserError(
                f"a worker died {_RETRIES} times at the same job ({method}: {text[:150]}); "
                f"is there enough memory? try fewer --workers, {_AGAIN}"
            ) from error

    def _miss(self, task: _Task, error: Exception) -> None:
        """Notes that the file server was silent; before the last try `Session.dead` knows if it died."""
        task.misses += 1
        if task.misses >= _MISSES:
            raise UserError(
                f"files of the study did not reach a node {_MISSES} times ({str(error)[:150]}); check the "
                f"network between the nodes, {_AGAIN}"
            ) from error
        time.sleep(_TICK)

    def _revive(self) -> None:
        """Starts a local Ray anew; a cluster cannot be."""
        self.staff.forget()
        if self.session.address is not None:
            raise UserError(
                f"--ray-address {self.session.address}: the cluster, or Ray on this machine, no longer "
                f"answers; start it again, {_AGAIN}"
            )
        self._restarts += 1
        if self._restarts > _RESTARTS:
            raise UserError(f"Ray died {self._restarts} times; is there enough memory? free some, {_AGAIN}")
        console.print("note: Ray died on this machine: it is started anew, and what ran is run again")
        self.session.restart()

    def broadcast(self, method: str, *args: Any) -> None:
        self._broadcasts.append((method, args))

    def close(self) -> None:
        """Ends the workers, and removes the copies of files that nodes made for them."""
        try:
            if self.staff.mirrors and not self.session.dead():
                self._clean()
        finally:
            self.session.close()

    def _clean(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for member in [*self.staff.members]:
            self.staff.bury(member)
        alive = self.session.nodes()
        removing = self._ray.remote(num_cpus=0, max_retries=0)(places.remove)
        removals = [
            removing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                Path(folder)
            )
            for node, folder in sorted(self.staff.mirrors)
            if node in alive
        ]
        if removals:
            self._ray.wait(removals, num_returns=len(removals), timeout=_TO_CLEAN)
