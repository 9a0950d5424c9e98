"""Machines that a search may run on: cores, memory, disk, network and price, with where that is published.

What no maker publishes (a core's speed at this work, prices) is an assumption, and its `source` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from search.memory import run_bytes
from spaces.inventory import Inventory

_GB = 10**9
_SHARE = 0.9  # of the memory, as `search.memory` plans


@dataclass(frozen=True)
class Machine:
    """A node.

    Attributes:
        title: What it is.
        cores: Of the CPU; a worker uses one.
        memory: Bytes.
        bandwidth: Bytes a second between memory and CPU, all cores together.
        disk: Bytes the disks hold.
        reading, writing: Bytes a second of the disks, in sequence.
        network: Bytes a second to another node.
        price: US dollars an hour.
        source: Where all that is from.
        core: Speed of a core over that of the one rates were measured on.
    """

    title: str
    cores: int
    memory: int
    bandwidth: float
    disk: int
    reading: float
    writing: float
    network: float
    price: float
    source: str
    core: float = 1.0

    def workers(self, inventory: Inventory, stream: bool) -> int:
        """Workers that its memory and its cores allow; 0: not even one."""
        count = self.cores
        while count and run_bytes(inventory, count, stream) > _SHARE * self.memory:
            count -= 1
        return count


LAPTOP = Machine(
    title="AMD Ryzen AI Max+ 395, 128 GB, NVMe of 8 TB",
    cores=16,
    memory=128 * _GB,
    bandwidth=256e9,
    disk=8000 * _GB,
    reading=7.2e9,
    writing=6.6e9,
    network=0.3e9,
    price=0.10,
    source="AMD product page: 16 cores, 256-bit LPDDR5x-8000 (256 GB/s), up to 128 GB; WD_BLACK SN850X data "
    "sheet, 8 TB: 7.2 GB/s reading, 6.6 GB/s writing; 2.5 Gb/s Ethernet; price: an assumption (power, and a "
    "part of what the machine costs)",
)

GPU_NODE = Machine(
    title="NVIDIA DGX H100: 8 H100 SXM, 2 Xeon Platinum 8480C, 2 TB",
    cores=112,
    memory=2000 * _GB,
    bandwidth=614e9,
    disk=30720 * _GB,
    reading=25e9,
    writing=12e9,
    network=50e9,
    price=24.0,
    source="NVIDIA DGX H100 data sheet: 112 cores, 2 TB of memory, 8 x 3.84 TB of NVMe, 400 Gb/s a port; "
    "Intel, Xeon Platinum 8480C: 8 channels of DDR5-4800, twice, 614 GB/s; speed of the disks and price (3 "
    "dollars an hour for a GPU): assumptions",
)

CPU_NODE = Machine(
    title="AMD EPYC 9554, 64 cores, 768 GB",
    cores=64,
    memory=768 * _GB,
    bandwidth=460.8e9,
    disk=15360 * _GB,
    reading=6.8e9,
    writing=4.0e9,
    network=3.1e9,
    price=3.0,
    source="AMD product page, EPYC 9554: 64 cores, 12 channels of DDR5-4800, 460.8 GB/s; Samsung PM9A3 data "
    "sheet: 6.8 GB/s reading, 4.0 GB/s writing; 25 Gb/s Ethernet; memory, disk size and price: assumptions",
)


UNKNOWN_DISK = 1e9
"""Bytes a second that a disk of unknown speed is taken to read; half of it to write."""


def this_machine(cores: int, memory: int, disk: int) -> Machine:
    """The machine at hand: what it has is known, its rates are not.

    Args:
        cores: Of its CPU.
        memory: Bytes that are free.
        disk: Bytes that are free.
    """
    return Machine(
        title="this machine",
        cores=cores,
        memory=memory,
        bandwidth=float("inf"),
        disk=disk,
        reading=UNKNOWN_DISK,
        writing=UNKNOWN_DISK / 2,
        network=float("inf"),
        price=0.0,
        source="cores, memory and free space as the system says",
    )


def cached(machine: Machine) -> Machine:
    """A machine whose free memory holds all files, so that its disk is hardly waited for."""
    return replace(machine, reading=float("inf"), writing=float("inf"))
