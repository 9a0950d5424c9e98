"""What fits into memory, decided before a worker starts."""

from __future__ import annotations

from search.console import console
from spaces.budget import format_size
from spaces.inventory import Inventory
from spaces.quant_types import LADDER

_SHARE = 0.8


def streams(option: str, inventory: Inventory, workers: int) -> bool:
    """Whether workers hold one layer at a time: as asked (yes, no), or where models would not fit (auto)."""
    import psutil

    if option != "auto":
        return option == "yes"
    needed = 4 * inventory.parameters() * max(1, workers)
    free = psutil.virtual_memory().available
    if needed <= _SHARE * free:
        return False
    console.print(
        f"{format_size(needed)} would hold the model in float32 for {max(1, workers)} workers, "
        f"{format_size(free)} are free: it is streamed from disk layer by layer"
    )
    return True


def cache_bytes(inventory: Inventory, workers: int, stream: bool) -> int:
    """Dequantized weights each worker may keep: a tenth of what is free, at most every variant there is."""
    import psutil

    if stream:
        return 0
    free = psutil.virtual_memory().available - 4 * inventory.parameters() * max(1, workers)
    return max(0, min(free // (10 * max(1, workers)), 4 * inventory.parameters() * len(LADDER)))
