"""Sizes as people write them, and what has to fit in a device's memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from spaces.devices import Device
from spaces.errors import UserError
from spaces.inventory import Inventory

RESERVE = 8 * 10**9
"""Bytes left to the operating system and the runtime."""

_UNITS = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?B)\s*", re.IGNORECASE | re.ASCII)
_CANONICAL = {unit.lower(): unit for unit in _UNITS}


def parse_size(text: str, option: str = "size") -> int:
    """Bytes of a size such as "103GB" (10^9) or "96GiB" (2^30).

    Raises:
        UserError: Not a positive number with a unit from B, KB..TB, KiB..TiB.
    """
    match = _SIZE.fullmatch(text) if len(text) < 64 else None
    size = int(Decimal(match[1]) * _UNITS[_CANONICAL[match[2].lower()]]) if match else 0
    if size <= 0:
        raise UserError(
            f"{option}: {text[:64]!r} is not a size; write a positive number and a unit, "
            "as in 103GB or 96GiB (KB, MB, GB, TB are powers of 1000, KiB to TiB of 1024)"
        )
    return size


def format_size(size: float) -> str:
    """Bytes in decimal units, three significant digits or more."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(size) >= _UNITS[unit]:
            value = size / _UNITS[unit]
            return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f} {unit}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class Budget:
    """What the weights may take, and what else shares the device's memory.

    Attributes:
        weights: Bytes the model file may take.
        device_memory: Bytes of the device.
        context: Tokens the KV cache is sized for.
        kv_cache: Bytes of the KV cache at that context.
        compute_buffer: Bytes of activations llama.cpp allocates, estimated.
        reserve: Bytes left to the operating system and the runtime.
    """

    weights: int
    device_memory: int
    context: int
    kv_cache: int
    compute_buffer: int
    reserve: int

    @classmethod
    def on(cls, device: Device, model: Inventory, weights: int, context: int) -> Budget:
        """`weights` bytes of a model with `context` tokens in the KV cache, on a device."""
        return cls(
            weights=weights,
            device_memory=device.memory,
            context=context,
            kv_cache=model.kv_cache_bytes(context),
            compute_buffer=model.compute_buffer_bytes(context),
            # A small model on a big device leaves the reserve to the device's own scale.
            reserve=min(RESERVE, device.memory // 8),
        )

    @property
    def overhead(self) -> int:
        """Bytes beside the weights."""
        return self.kv_cache + self.compute_buffer + self.reserve

    @property
    def limit(self) -> int:
        """Bytes of weights allowed by both the budget and the device."""
        return min(self.weights, self.device_memory - self.overhead)

    @property
    def fits(self) -> bool:
        """Whether the device holds the weights and all that is beside them."""
        return self.weights + self.overhead <= self.device_memory

    def check(self) -> None:
        """Refuses a budget that the device cannot hold, before any work is done."""
        if not self.fits:
            raise UserError(
                f"--budget {format_size(self.weights)} does not fit the device: with "
                f"{format_size(self.kv_cache)} KV cache for {self.context} tokens, "
                f"{format_size(self.compute_buffer)} compute buffer and {format_size(self.reserve)} "
                f"reserve it needs {format_size(self.weights + self.overhead)} of "
                f"{format_size(self.device_memory)}; lower --budget or --context, or raise --device-memory"
            )
