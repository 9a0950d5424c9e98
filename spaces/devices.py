"""Hardware profiles: memory and the bandwidth that bounds decoding."""

from __future__ import annotations

from dataclasses import dataclass

from spaces.errors import unknown


@dataclass(frozen=True)
class Device:
    """A machine a model is fitted to.

    Attributes:
        name: As given to `--device`.
        title: As its maker calls it.
        memory: Bytes the model can use.
        bandwidth: Peak bytes per second between that memory and the processor.
        efficiency: Share of `bandwidth` that decoding reaches (the roofline's eta).
        source: Where memory and bandwidth are published.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    source: str
    efficiency: float = 0.6


_GB = 10**9

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("ryzen-ai-max-395", "AMD Ryzen AI Max+ 395, 128 GB", 128 * _GB, 256e9,
               "AMD product page: 256-bit LPDDR5x-8000, up to 128 GB"),
        Device("dgx-spark", "NVIDIA DGX Spark, 128 GB", 128 * _GB, 273e9,
               "NVIDIA DGX Spark specifications: 128 GB LPDDR5x, 273 GB/s"),
        Device("mac-studio-m3-ultra-96", "Apple Mac Studio M3 Ultra, 96 GB", 96 * _GB, 819e9,
               "Apple Mac Studio (2025) specifications: 819 GB/s"),
        Device("mac-studio-m3-ultra-256", "Apple Mac Studio M3 Ultra, 256 GB", 256 * _GB, 819e9,
               "Apple Mac Studio (2025) specifications: 819 GB/s"),
        Device("mac-studio-m3-ultra-512", "Apple Mac Studio M3 Ultra, 512 GB", 512 * _GB, 819e9,
               "Apple Mac Studio (2025) specifications: 819 GB/s"),
        Device("rtx-5090", "NVIDIA GeForce RTX 5090, 32 GB", 32 * _GB, 1792e9,
               "NVIDIA GeForce RTX 5090 specifications: 32 GB GDDR7, 1792 GB/s"),
        Device("ddr5-desktop-192", "Dual-channel DDR5-5600 desktop, 192 GB", 192 * _GB, 89.6e9,
               "JEDEC DDR5-5600: 2 channels x 8 bytes x 5.6 GT/s"),
        Device("raspberry-pi-5-16", "Raspberry Pi 5, 16 GB", 16 * _GB, 17.1e9,
               "Raspberry Pi 5 product brief: 32-bit LPDDR4X-4267"),
    )
}  # fmt: skip

DEFAULT_DEVICE = "ryzen-ai-max-395"


def device(name: str) -> Device:
    """The profile called `name`; an unknown name is a `UserError` with the nearest one."""
    try:
        return DEVICES[name]
    except KeyError:
        raise unknown("--device", name, DEVICES) from None
