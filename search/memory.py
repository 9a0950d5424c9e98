"""What fits into memory, decided before a worker starts.

The estimate of a worker is the sum of what it holds at its largest job; `tests/faults/test_memory.py`
compares it with the peak that a worker really has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.console import console
from search.machine_memory import address_space, free_memory
from search.runner import ROUND, SLOPE_PROBES, SLOPE_TOKENS
from search.stages import REPAIR_TOKENS, REPORT_TOKENS, SEARCH_TOKENS
from spaces.budget import format_size
from spaces.errors import UserError
from spaces.inventory import Inventory
from spaces.quant_types import LADDER

_SHARE = 0.9  # of what is free: other programs move too
_FLOAT = 4

# Measured resident sizes: Python with torch and transformers; a driver with Optuna, MLflow, Ray's client
# and the report's libraries; Ray's own processes with an object store of 128 MiB.
_WORKER = 400 * 10**6
_DRIVER = 850 * 10**6
_RAY = 600 * 10**6
_HEAP = 300 * 10**6  # of a worker: freed, but between what is not
_ADDRESSES = 2 * 10**9  # of a worker that are never resident: libraries, threads' stacks

_STATES = 2**30  # bytes of states that `evaluators.population` holds at once
_LOGITS = 6 * _FLOAT * 2**22  # `evaluators.divergence`: logits, their softmax, logarithm and copies
_GRADIENTS = 2**28, 2**26  # weights: held by `evaluators.projection`, taken at once by `evaluators.slopes`
_SLOPE_WINDOW = 64  # tokens of a window of slopes, about


@dataclass(frozen=True)
class Plan:
    """How the workers of a run are to be made.

    Attributes:
        workers: How many; 0: this process.
        stream: Whether they hold one layer at a time.
        cache_bytes: Dequantized weights that each may keep.
    """

    workers: int
    stream: bool
    cache_bytes: int


def worker_bytes(inventory: Inventory, stream: bool, cache: int = 0) -> int:
    """The largest resident size of a worker, bytes, without the mapped files that the system can drop.

    Args:
        inventory: Of the searched model.
        stream: Whether it holds one layer at a time.
        cache: Dequantized weights it keeps.
    """
    layers = [0] * inventory.layers
    outside = largest = stack = 0
    for tensor in inventory.tensors:
        stack = max(stack, tensor.parameters)
        largest = max(largest, tensor.parameters // (tensor.shape[0] if tensor.per_expert else 1))
        if tensor.layer is None:
            outside += tensor.parameters
        else:
            layers[tensor.layer] += tensor.parameters
    weights = outside + (max(layers) if stream else sum(layers))
    output = inventory.by_name[_output(inventory)].parameters  # once more, uncompressed
    row = _FLOAT * inventory.hidden
    scoring = min(_STATES, 2 * row * SEARCH_TOKENS * ROUND) + _LOGITS
    texts = 2 * row * (REPORT_TOKENS if stream else REPAIR_TOKENS) + _LOGITS
    kinds = 1 + SLOPE_PROBES
    held, at_once = _GRADIENTS
    draws = kinds * SLOPE_TOKENS // _SLOPE_WINDOW
    slopes = row * SLOPE_TOKENS * (inventory.layers + 1 + 2 * kinds)
    slopes += _FLOAT * min(held, draws * (output + min(at_once, max(layers))))
    slopes += _FLOAT * min(held, draws * stack)
    work = max(scoring, texts, 3 * _FLOAT * largest, 0 if stream else slopes)
    return _WORKER + _HEAP + _FLOAT * (weights + output) + cache + work


def _output(inventory: Inventory) -> str:
    return "output.weight" if "output.weight" in inventory.by_name else "token_embd.weight"


def run_bytes(inventory: Inventory, workers: int, stream: bool, cache: int = 0) -> int:
    """What a run takes with all its processes, bytes."""
    worker = worker_bytes(inventory, stream, cache)
    return _DRIVER + (worker - _WORKER if workers == 0 else _RAY + workers * worker)


def make_plan(
    inventory: Inventory,
    workers: int,
    stream: str = "auto",
    types: Sequence[str] = (),
    elsewhere: bool = False,
    fewer: bool = False,
    begun: bool | None = None,
) -> Plan:
    """How many workers there are to be, and whether they stream, in the memory that is free.

    Args:
        inventory: Of the searched model.
        workers: How many were asked for; 0: this process.
        stream: auto, yes or no.
        types: The only types of a search; () for all.
        elsewhere: Whether workers are on other machines, of whose memory nothing is known here.
        fewer: Whether there may be fewer workers where they do not fit.
        begun: Whether the study streamed where it was begun, as costs, slopes and repairs hang on it.

    Raises:
        UserError: What was asked for does not fit, or is not how the study was begun.
    """
    free = free_memory()
    ways = {"auto": [False, True], "yes": [True], "no": [False]}[stream]
    if begun is not None:
        if begun not in ways:
            was = "yes" if begun else "no"
            raise UserError(
                f"--stream {stream}: the study was begun with {was}, and its trials hang on that; leave the "
                "option out, or give another --study"
            )
        ways = [begun]
    counts = range(workers, 0, -1) if fewer else [workers]
    for way in ways:
        for count in counts:
            if (elsewhere and way) or _fits(inventory, count, way, free):
                _say(inventory, workers, count, way != ways[0], free)
                return Plan(count, way, _cache(inventory, count, way, types, free))
    if elsewhere:
        return Plan(workers, ways[0], 0)
    raise UserError(_too_little(inventory, workers, ways, free, begun is None))


def _fits(inventory: Inventory, workers: int, stream: bool, free: int) -> bool:
    limit = address_space()
    if limit is not None and worker_bytes(inventory, stream) + _ADDRESSES > limit:
        return False
    return run_bytes(inventory, workers, stream) <= _SHARE * free


def _cache(inventory: Inventory, workers: int, stream: bool, types: Sequence[str], free: int) -> int:
    """A tenth of what is left, shared by the workers; at most every variant there is."""
    if stream:
        return 0
    left = int(_SHARE * free) - run_bytes(inventory, workers, stream)
    every = _FLOAT * inventory.parameters() * len(types or LADDER)
    return max(0, min(left // (10 * max(1, workers)), every))


def _say(inventory: Inventory, wanted: int, workers: int, streamed: bool, free: int) -> None:
    """A line where memory decided what otherwise would have been different."""
    if streamed:
        needed = run_bytes(inventory, wanted, False)
        console.print(
            f"{format_size(needed)} would hold the model in float32 for {max(1, wanted)} workers, "
            f"{format_size(free)} are free: it is streamed from disk layer by layer"
        )
    if workers != wanted:
        console.print(f"{format_size(free)} are free: {workers} workers instead of {wanted}, one per core")


def _too_little(inventory: Inventory, workers: int, ways: Sequence[bool], free: int, new: bool) -> str:
    """What is missing, and what would fit instead; only a new study may become a streamed one."""
    needed = min(run_bytes(inventory, workers, way) for way in ways)
    limit = address_space()
    least = min(worker_bytes(inventory, way) for way in ways) + _ADDRESSES
    if limit is not None and least > limit:
        return (
            f"--workers {workers}: a worker needs {format_size(least)} of addresses, `ulimit -v` allows "
            f"{format_size(limit)}; raise the limit"
        )
    head = f"--workers {workers}: the run needs {format_size(needed)} of memory, {format_size(free)} are free"
    for stream in (*ways, True) if new else ways:
        fewer = [n for n in range(workers - 1, 0, -1) if _fits(inventory, n, stream, free)]
        streamed = " --stream yes" if stream not in ways else ""
        if streamed and _fits(inventory, workers, stream, free):
            return f"{head}; give --stream yes"
        if fewer:
            return f"{head}; give --workers {fewer[0]}{streamed}"
        if workers != 0 and _fits(inventory, 0, stream, free):
            return f"{head}; give --workers 0{streamed}"
    least = min(run_bytes(inventory, 0, way) for way in ({*ways, True} if new else ways))
    return f"{head}; close other programs: {format_size(least)} are needed at least"


def streams(option: str, inventory: Inventory, workers: int) -> bool:
    """Whether workers hold one layer at a time: as asked (yes, no), or where models would not fit (auto)."""
    if option != "auto":
        return option == "yes"
    return not _fits(inventory, workers, False, free_memory())
