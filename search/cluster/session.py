"""Ray for the length of a run: started on this machine or joined, watched, and started anew when it dies."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from spaces.errors import UserError

_PACKAGES = ("spaces", "compression", "evaluators", "search")
# OpenMP threads that spin while they wait starve the other workers.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_ANSWER = 5.0  # seconds an answer of a cluster's head may take
_SILENT = 15.0  # seconds without one after which it counts as dead; Ray itself ends a process after 60


class Session:
    """A connection to Ray.

    A local Ray listens on loopback only. A joined cluster is sent this project's packages, so that its
    nodes need no more than the dependencies.

    Args:
        workers: CPUs of a local Ray.
        address: HOST:PORT of a cluster to join, or auto; None: start Ray on this machine.

    Attributes:
        node: Ray's name of the driver's node.

    Raises:
        UserError: Ray cannot be started or joined.
    """

    def __init__(self, workers: int, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Workers are what the study is about: Ray would let everything else go first.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Its first driver waits for workers that nobody asked for, and for ever where one of them is killed.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        if address is not None:
            check_reachable(address)
        import ray
        from ray._private import ray_constants

        # Ray listens on every address of a machine unless it takes 127.0.0.1 for its own, as it does where
        # it knows no clusters; an address given to `ray.init` is replaced by the machine's.
        ray_constants.ENABLE_RAY_CLUSTER = address is not None
        self._ray: Any = ray
        self._workers, self.address = workers, address
        self._begin()

    def _begin(self) -> None:
        ray, root = self._ray, Path(__file__).resolve().parents[2]
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is None:
                paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
                ray.init(
                    address="local",
                    num_cpus=self._workers,
                    include_dashboard=False,
                    object_store_memory=128 * 2**20,
                    runtime_env={"env_vars": {**_ENVIRONMENT, "PYTHONPATH": paths}},
                    **quiet,
                )
            else:
                packages = [str(root / name) for name in _PACKAGES]
                code = {"py_modules": packages, "excludes": ["__pycache__"], "env_vars": _ENVIRONMENT}
                ray.init(address=self.address, runtime_env=code, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            raise UserError(f"Ray cannot be started ({str(error)[:200]})") from error
        context = ray.get_runtime_context()
        self.node: str = context.get_node_id()
        self._gcs: str = context.gcs_address
        self._silent: float | None = None
        self._family = self._started()

    def _started(self) -> set[psutil.Process]:
        """The processes that a local Ray consists of so far."""
        node = self._ray._private.worker._global_node
        found = set[psutil.Process]()
        for started in node.all_processes.values() if self.address is None and node is not None else ():
            for process in started:
                with suppress(psutil.Error):
                    found |= {*psutil.Process(process.process.pid).children(recursive=True)}
        return found

    def nodes(self) -> dict[str, int]:
        """CPUs of every node that lives, by Ray's name of it; empty where nobody says so in time."""
        rows = _in_time(self._ray.nodes, _ANSWER) or []
        return {n["NodeID"]: int(n["Resources"].get("CPU", 0)) for n in rows if n["Alive"]}

    def dead(self) -> bool:
        """Whether Ray is gone for this process: its head, or the part of it on this node."""
        if self.address is None:
            node = self._ray._private.worker._global_node
            if node is None:
                return True
            watched = [
                p.process for kind in ("gcs_server", "raylet") for p in node.all_processes.get(kind, [])
            ]
            return not watched or any(p.poll() is not None for p in watched)
        if self._answers():
            self._silent = None
        elif self._silent is None:
            self._silent = time.monotonic()
        return self._silent is not None and time.monotonic() - self._silent > _SILENT

    def _answers(self) -> bool:
        """Whether a cluster's head is there and counts this node among the living."""
        host, _, port = self._gcs.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER).close()
        except OSError:
            return False
        return self.node in self.nodes()

    def restart(self) -> None:
        """Starts a local Ray anew.

        Raises:
            UserError: It cannot be started again.
        """
        self.close()
        self._begin()

    def close(self) -> None:
        """Lets go of Ray; ends a local one."""
        family = self._family | self._started()
        self._ray.shutdown()
        for process in family:  # one whose parent was killed is not ended by Ray
            with suppress(psutil.Error):
                process.kill()


def check_reachable(address: str) -> None:
    """A dead address makes `ray.init` hang; a closed port is found at once.

    Raises:
        UserError: Nobody listens there, or it is no address to join.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise UserError(
            f"--ray-address {address}: files cannot be sent through Ray's client; run the command on a node "
            "of the cluster and give the HOST:PORT of its head"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--ray-address {address!r} must be HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({error})") from error


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """What `ask` gives, None where it takes longer: a call to a dead head does not return."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
