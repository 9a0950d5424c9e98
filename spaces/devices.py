"""Hardware profiles, and how long a device takes to read and decode weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from spaces.errors import unknown


@dataclass(frozen=True)
class Device:
    """A machine a model is fitted to.

    A desktop with a graphics card has two tiers: `gpu_memory` bytes at `bandwidth`, decoded by the GPU,
    and the rest of `memory` at `host_bandwidth`, decoded by the CPU.

    A GPU needs some time to start each operation, which no profile counts: where a token reads less than a
    few GB from a fast GPU, it is slower than predicted.

    Attributes:
        name: As given to `--device`.
        title: As its maker calls it.
        memory: Bytes the model can use, both tiers together.
        bandwidth: Peak bytes per second between that memory and the processor.
        source: Where memory and bandwidth are published.
        efficiency: Share of a peak bandwidth that decoding reaches (the roofline's eta).
        rates: Weights per second that the whole CPU decodes, by GGUF type; a type that is not there is
            bound by memory. None: decoding is bound by memory, or nobody measured it, and then the
            roofline is an upper bound.
        cores: CPU cores `rates` are of, 0 without.
        overhead: Seconds of a token that no weight accounts for.
        gpu_memory: Bytes of the first tier; None: there is one tier.
        host_bandwidth: Peak bytes per second of the second tier.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    source: str
    efficiency: float = 0.6
    rates: Mapping[str, float] | None = None
    cores: int = 0
    overhead: float = 0.0
    gpu_memory: int | None = None
    host_bandwidth: float = 0.0

    def seconds(self, size: float, weights: float = 0, type_name: str = "", host: bool = False) -> float:
        """Seconds to read `size` bytes and decode the weights in them.

        The roofline with a ceiling for every type:

            max(size / (efficiency * bandwidth), weights / rates[type_name])

        Reading and decoding overlap, so the slower one is the time. On a GPU the second term is left out.

        Args:
            size: Bytes.
            weights: Weights these bytes hold.
            type_name: Their GGUF type.
            host: In the second tier.
        """
        reading = size / (self.efficiency * (self.host_bandwidth if host else self.bandwidth))
        by_cpu = host or self.gpu_memory is None
        rate = self.rates.get(type_name) if self.rates and by_cpu else None
        return reading if rate is None else max(reading, weights / rate)


def core_rates() -> dict[str, float]:
    """Weights per second that one CPU core decodes, by GGUF type.

    Measured by `experiments.decode_speed` through llama.cpp (an AVX2 build) on server cores of the Zen 4
    design; decode_rates.json names them.
    """
    text = resources.files("spaces").joinpath("decode_rates.json").read_text("utf-8")
    rates: dict[str, float] = json.loads(text)["per_core"]
    return rates


def _scaled(cores: int) -> dict[str, float]:
    """An estimate for `cores` desktop cores of the same design.

    It takes that cores do not slow each other down, which leaves out sinking clocks, and that a desktop's
    clock is the measured server's, though it is higher by a third or more: a cautious figure.
    """
    return {name: rate * cores for name, rate in core_rates().items()}


_GB = 10**9
_CORES = 16
_DDR5 = 89.6e9
_DDR5_SOURCE = (
    f"JEDEC DDR5-5600: 2 channels x 8 bytes x 5.6 GT/s; decode rates are an estimate, {_CORES} times one "
    "measured Zen 4 core"
)
_RTX_5090 = "NVIDIA GeForce RTX 5090 specifications: 32 GB GDDR7, 1792 GB/s"
_M3_ULTRA = "Apple Mac Studio (2025) technical specifications: M3 Ultra, 819 GB/s, 96, 256 or 512 GB"
# Reviewers measured 17 to 18 tokens/s of DeepSeek-R1 in 404 GB (wccftech.com, March 2025); the roofline
# gives 36.9 at an efficiency of 1.
_M3_ULTRA_EFFICIENCY = 0.48


def _mac_studio(memory: int) -> Device:
    return Device(
        f"mac-studio-m3-ultra-{memory}", f"Apple Mac Studio M3 Ultra, {memory} GB", memory * _GB, 819e9,
        _M3_ULTRA, _M3_ULTRA_EFFICIENCY,
    )  # fmt: skip


def _desktop(memory: int) -> Device:
    return Device(
        f"ddr5-desktop-{memory}", f"{_CORES}-core desktop, dual-channel DDR5-5600, {memory} GB",
        memory * _GB, _DDR5, _DDR5_SOURCE, rates=_scaled(_CORES), cores=_CORES,
    )  # fmt: skip


def _desktop_with_gpu(memory: int) -> Device:
    return Device(
        f"rtx-5090-ddr5-{memory}",
        f"NVIDIA GeForce RTX 5090, 32 GB, and a {_CORES}-core host, dual-channel DDR5-5600, {memory} GB",
        (32 + memory) * _GB, 1792e9, f"{_RTX_5090}; {_DDR5_SOURCE}", rates=_scaled(_CORES), cores=_CORES,
        gpu_memory=32 * _GB, host_bandwidth=_DDR5,
    )  # fmt: skip


DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("ryzen-ai-max-395", "AMD Ryzen AI Max+ 395, 128 GB", 128 * _GB, 256e9,
               "AMD product page: 256-bit LPDDR5x-8000, up to 128 GB"),
        Device("dgx-spark", "NVIDIA DGX Spark, 128 GB", 128 * _GB, 273e9,
               "NVIDIA DGX Spark specifications: 128 GB LPDDR5x, 273 GB/s"),
        *(_mac_studio(memory) for memory in (96, 256, 512)),
        Device("rtx-5090", "NVIDIA GeForce RTX 5090, 32 GB", 32 * _GB, 1792e9, _RTX_5090),
        _desktop_with_gpu(64),
        _desktop_with_gpu(128),
        _desktop(96),
        _desktop(192),
        # A Cortex-A76 decodes by other kernels than those measured, so its rates are unknown.
        Device("raspberry-pi-5-16", "Raspberry Pi 5, 16 GB", 16 * _GB, 17.1e9,
               "Raspberry Pi 5 product brief: 32-bit LPDDR4X-4267; no decode rates, so an upper bound"),
    )
}  # fmt: skip

DEFAULT_DEVICE = "ryzen-ai-max-395"


def device(name: str) -> Device:
    """The profile called `name`; an unknown name is a `UserError` with the nearest one."""
    try:
        return DEVICES[name]
    except KeyError:
        raise unknown("--device", name, DEVICES) from None
