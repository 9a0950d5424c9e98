"""Which workers a pool has: as many as asked for while the cluster has the CPUs, fewer when nodes leave.

One worker is always on the driver's node, so that jobs that write into the study's folder find one
that can; where that node offers no CPU, it takes none of Ray's account.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search.cluster.seat import Arrival, Home, Seat
from search.cluster.session import Session
from search.console import console
from spaces.errors import UserError

if TYPE_CHECKING:
    from search.worker import Setup


@dataclass(eq=False)
class Member:
    """A worker.

    Attributes:
        actor: Its `Seat`.
        arriving: Resolves to its `Arrival` once it has started.
        pinned: Whether it has to be on the driver's node.
        arrival: Where it is; None while it starts.
        told: Broadcasts it has seen.
        busy: Whether it runs a job.
    """

    actor: Any
    arriving: Any
    pinned: bool
    arrival: Arrival | None = None
    told: int = 0
    busy: bool = False


class Staff:
    """The workers of a pool.

    Args:
        session: Ray.
        workers: How many there are to be.
        seat: Arguments of `Seat`: kind and setup of the workers, how to know home, the file server.

    Attributes:
        members: Those that live or start.
        limit: How many there may be; lowered where memory does not suffice.
        mirrors: (node, folder) of copies of the study's files that workers made.
    """

    def __init__(
        self, session: Session, workers: int, seat: tuple[Callable[..., Any], Setup, Home | None, Any]
    ) -> None:
        import ray

        self._ray: Any = ray
        self.session, self._seat = session, seat
        self.workers = self.limit = workers
        self.members: list[Member] = []
        self.mirrors: set[tuple[str, str]] = set()
        self._said = workers

    def tend(self) -> None:
        """Lets workers arrive, and starts or drops some so that there are as many as there is room for.

        Raises:
            UserError: A worker cannot be made.
        """
        self._welcome()
        nodes = self.session.nodes()
        if self.session.node not in nodes:
            return  # nobody answers: `Session.dead` decides
        room = sum(nodes.values()) + (nodes[self.session.node] == 0)
        wanted = min(self.limit, room)
        if not any(m.pinned for m in self.members):
            self._add(pinned=True, cpus=min(1, nodes[self.session.node]))
        while len(self.members) < wanted:
            self._add(pinned=False, cpus=1)
        # One that waits for a CPU that left would wait for ever; so it is given up first.
        spare = sorted(
            (m for m in self.members if not m.pinned and not m.busy), key=lambda m: m.arrival is not None
        )
        for member in spare[: max(0, len(self.members) - wanted)]:
            self.bury(member)
        self._say(sum(nodes.values()))

    def _welcome(self) -> None:
        for member in [m for m in self.members if m.arrival is None]:
            if not self._ray.wait([member.arriving], timeout=0)[0]:
                continue
            try:
                member.arrival = self._ray.get(member.arriving)
            except self._ray.exceptions.RayError as error:
                self.bury(member)
                if getattr(error, "actor_init_failed", False) or isinstance(
                    error, self._ray.exceptions.RuntimeEnvSetupError
                ):
                    raise UserError(f"a worker cannot be made: {_reason(error)}") from error
                if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                    self.fewer()
                continue
            if member.arrival.folder is not None:
                self.mirrors.add((member.arrival.node, member.arrival.folder))

    def _add(self, pinned: bool, cpus: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where: Any = "DEFAULT"
        if pinned:
            where = NodeAffinitySchedulingStrategy(self.session.node, soft=False)
        options = {"num_cpus": cpus, "max_restarts": 0, "scheduling_strategy": where}
        actor = self._ray.remote(**options)(Seat).remote(*self._seat)
        self.members.append(Member(actor, actor.arrive.remote(), pinned))

    def bury(self, member: Member) -> None:
        """Forgets a worker, and ends it if it lives."""
        self._ray.kill(member.actor)
        self.members.remove(member)

    def forget(self) -> None:
        """Forgets all workers, whose Ray is gone."""
        self.members.clear()

    def fewer(self) -> bool:
        """Lowers the limit by one worker for lack of memory; whether it could."""
        if self.limit < 2:
            return False
        self.limit = min(self.limit, len(self.members) + 1) - 1
        return True

    def _say(self, cpus: int) -> None:
        """One line when the number of workers changed."""
        count = len(self.members)
        if count != self._said:
            lacking = f"{cpus} CPUs in the cluster"
            if self.limit < self.workers and count == self.limit:
                lacking = "one was killed for lack of memory"
            line = (
                f"{count} of {self.workers} workers ({lacking})"
                if count < self.workers
                else "all workers again"
            )
            console.print(f"note: goes on with {line}", soft_wrap=True)
            self._said = count


def _reason(error: BaseException) -> str:
    """What a worker's constructor raised, without the way there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
