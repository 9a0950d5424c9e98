"""Machines for tests: network namespaces with an address and a Ray node each, on one computer.

The first is the driver's. The second has temporary folders, shared memory and a source tree of its own,
all empty at first, so that it sees neither the study's files nor this project's code.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORT = 6399
_TEMPORARY = ("/tmp", "/dev/shm", "/var/tmp")
_SOURCES = ("spaces", "compression", "evaluators", "search", "experiments", "tests")


def _sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def refusal() -> str | None:
    """Why this computer cannot make machines; None where it can."""
    for needed in (ROOT, Path(sys.prefix)):
        if any(needed.is_relative_to(path) for path in _TEMPORARY):
            return f"{needed} is below a temporary folder, which a second machine must not see"
    try:
        _sh("unshare", "-n", "-m", "sh", "-c", "mount -t tmpfs tmpfs /tmp && ip link set lo up")
        _sh("ip", "netns", "add", "moefit-probe")
        _sh("ip", "netns", "del", "moefit-probe")
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


class Machines:
    """Two machines that reach each other.

    Args:
        folder: For logs.

    Attributes:
        address: HOST:PORT of the cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"moefit-{os.getpid()}-{i}" for i in (1, 2)]
        self.hosts = ["10.213.7.1", "10.213.7.2"]
        self.address = f"{self.hosts[0]}:{PORT}"
        # A token of this cluster's own, as Ray has its nodes show one where it finds any.
        self._environment = {
            **os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "200",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }  # fmt: skip
        self._started: list[subprocess.Popen[bytes]] = []
        for name in self.names:
            _sh("ip", "netns", "add", name)
            _sh("ip", "-n", name, "link", "set", "lo", "up")
        first, second = self.names
        _sh("ip", "-n", first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second)
        for name, host in zip(self.names, self.hosts, strict=True):
            _sh("ip", "-n", name, "address", "add", f"{host}/24", "dev", "wire")
            _sh("ip", "-n", name, "link", "set", "wire", "up")

    def popen(
        self, machine: int, command: Sequence[str], log: Path, private: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a machine; `private` hides the temporary folders and the source tree."""
        before = "mount --make-rprivate /; "
        for path in (*_TEMPORARY, *(str(ROOT / name) for name in _SOURCES)):
            before += f"mount -t tmpfs tmpfs {path} && "
        shell = (before if private else "") + 'exec "$@"'
        inside = ["ip", "netns", "exec", self.names[machine], "unshare", "-m", "sh", "-c", shell, "sh"]
        with log.open("ab") as stream:
            started = subprocess.Popen(
                [*inside, *command], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True, env=self._environment, cwd="/" if private else ROOT,
            )  # fmt: skip
        self._started.append(started)
        return started

    def start_head(self, cpus: int = 1) -> None:
        """Starts Ray on the first machine."""
        self._ray(0, "--head", f"--port={PORT}", "--include-dashboard=false", f"--num-cpus={cpus}")

    def start_second(self, cpus: int = 1) -> None:
        """Starts Ray on the second machine."""
        self._ray(1, f"--address={self.address}", f"--num-cpus={cpus}", private=True)

    def _ray(self, machine: int, *options: str, private: bool = False) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        host = self.hosts[machine]
        command = [ray, "start", *options, f"--node-ip-address={host}", "--object-store-memory=100000000"]
        log = self.folder / f"ray-{machine}.log"
        before = log.read_text().count("Ray runtime started") if log.exists() else 0
        started = self.popen(machine, [*command, "--block", "--disable-usage-stats"], log, private)
        end = time.monotonic() + 120
        while log.read_text("utf-8").count("Ray runtime started") == before:
            if started.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text("utf-8")[-2000:])
            time.sleep(0.1)

    def pids(self, machine: int) -> list[int]:
        """Processes of a machine."""
        return [int(pid) for pid in _sh("ip", "netns", "pids", self.names[machine]).split()]

    def kill(self, machine: int, program: str) -> None:
        """kill -9 of a program of a machine."""
        for pid in self.pids(machine):
            if Path(f"/proc/{pid}/comm").read_text("utf-8").startswith(program):
                os.kill(pid, signal.SIGKILL)

    def lose(self, machine: int) -> None:
        """Takes a machine off the net and ends all it runs, as when its power fails."""
        _sh("ip", "-n", self.names[machine], "link", "set", "wire", "down")
        self._end(machine)

    def back(self, machine: int) -> None:
        """Puts a lost machine on the net again."""
        _sh("ip", "-n", self.names[machine], "link", "set", "wire", "up")

    def _end(self, machine: int) -> None:
        end = time.monotonic() + 20
        while (pids := self.pids(machine)) and time.monotonic() < end:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)

    def close(self) -> None:
        """Ends all that runs on the machines, and removes them."""
        for machine, name in enumerate(self.names):
            self._end(machine)
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)
        for started in self._started:
            started.wait(timeout=30)
