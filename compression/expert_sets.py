"""Which experts of a layer stay, chosen as a set by what the layer's output loses.

A ranking judges experts one by one, but what a set loses depends on which of its
experts stand in for the missing. The error of a layer's output is what NAEE (arXiv
2402.14800) minimises by trying every set. Here experts are removed one after the other,
each time the one whose loss costs least, and every set is then mended by swaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.candidate_model import CandidateModel
from compression.files import write_text
from compression.layer_error import DIMENSIONS, LayerError
from spaces.errors import MALFORMED, UserError
from spaces.inventory import Inventory

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 4096
"""Looked at, at most; fewer where a layer's projected outputs would be more than `_VALUES` numbers."""

_VALUES = 2**26
_SWAPS = 8  # per set, at most
_PAIRS = 16  # tried per swap
_GAIN = 1e-6  # of the error: a swap that gains less is none
_VERSION = 1

Kept = tuple[int, ...]
Sets = dict[int, dict[int, Kept]]
"""layer -> count -> experts that stay, ascending."""


def expert_sets(
    model: CandidateModel,
    windows: np.ndarray,
    counts: Sequence[int],
    protected: Sequence[Sequence[int]],
) -> Sets:
    """The experts to keep in every MoE layer, for every count.

    Args:
        model: The model; left uncompressed. One layer at a time is held, as in calibration.
        windows: (n, length) token ids; as many are looked at, evenly spread, as `TOKENS` allows.
        counts: Experts to keep: whole per group, at least as many as a token uses.
        protected: Experts of each MoE layer that stay, whatever the error, as long as there is room.
    """
    import torch

    inventory = model.inventory
    for count in counts:
        if count % inventory.groups or not inventory.top_k <= count <= inventory.experts:
            raise ValueError(
                f"counts must be multiples of {inventory.groups} within {inventory.top_k}.."
                f"{inventory.experts}, got {count}"
            )
    model.reset()
    out: Sets = {}
    stay = dict(zip(inventory.moe_layers, protected, strict=True))
    with torch.inference_mode():
        states = model.embed(torch.from_numpy(_some(windows, inventory).astype(np.int64)))
        for layer in range(inventory.moe_layers[-1] + 1):
            with model.held(layer):
                with _inputs(model, layer) as seen:
                    states = model.run(states, layer, layer + 1)
                if layer in stay:
                    out[layer] = choose(LayerError(model, layer, torch.cat(seen)), counts, stay[layer])
    return out


def _some(windows: np.ndarray, inventory: Inventory) -> np.ndarray:
    """Windows of at most as many tokens as memory and time allow, but one."""
    per_token = inventory.experts * min(inventory.hidden, DIMENSIONS)
    count = max(1, min(TOKENS, _VALUES // per_token) // windows.shape[1])
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


@contextmanager
def _inputs(model: CandidateModel, layer: int) -> Iterator[list[Tensor]]:
    """What enters the router of a layer while the block lasts: (tokens, hidden) tensors."""
    seen: list[Tensor] = []
    if not model.family.is_moe(layer):
        yield seen
        return

    def keep(module: Any, args: Any) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handle = model.shell.router(layer).module.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def choose(layer: LayerError, counts: Sequence[int], protected: Sequence[int]) -> dict[int, Kept]:
    """The best set found of every count."""
    nested = eliminate(layer, min(counts), protected)
    return {n: mend(layer, nested[n], protected) for n in sorted(counts)}


def eliminate(layer: LayerError, least: int, protected: Sequence[int]) -> dict[int, Kept]:
    """Nested sets of every possible count down to `least`, from all experts on."""
    kept = tuple(range(layer.experts))
    out = {len(kept): kept}
    while len(kept) > least:
        gone = _cheapest(layer, kept, protected)
        kept = tuple(e for e in kept if e not in gone)
        out[len(kept)] = kept
    return out


def _cheapest(layer: LayerError, kept: Kept, protected: Sequence[int]) -> list[int]:
    """One expert of each group whose loss together costs least, searched one group at a time."""
    state, size = layer.state(kept), layer.experts // layer.groups
    members = []
    for group in range(layer.groups):
        own = [e for e in kept if e // size == group]
        members.append([e for e in own if e not in protected] or own)
    going, _ = layer.shares(state)
    gone = [min(m, key=lambda e: going[e]) for m in members]
    # The choice in one group depends on those in the others: a second round sees them all.
    for _ in range(1 if layer.groups == 1 else 2):
        for group, own in enumerate(members):
            rest = [*gone[:group], *gone[group + 1 :]]
            costs = {e: layer.without(state, [*rest, e]) for e in own}
            gone[group] = min(costs, key=lambda e: costs[e])
    return gone


def mend(layer: LayerError, kept: Kept, protected: Sequence[int]) -> Kept:
    """Swaps kept experts for others of their group while that lowers the error."""
    size, best = layer.experts // layer.groups, layer.total(kept)
    for _ in range(_SWAPS):
        going, coming = layer.shares(layer.state(kept))
        pairs = [
            (going[old] + coming[new], old, new)
            for old in kept
            for new in set(range(layer.experts)) - {*kept}
            if new // size == old // size and (old not in protected or new in protected)
        ]
        trials = [tuple(sorted({*kept, new} - {old})) for _, old, new in sorted(pairs)[:_PAIRS]]
        errors = [layer.total(trial) for trial in trials]
        if min(errors, default=best) >= best * (1 - _GAIN):
            break
        best = min(errors)
        kept = trials[errors.index(best)]
    return kept


def _document(sets: Mapping[int, Mapping[int, Kept]]) -> dict[str, Any]:
    layers = {str(i): {str(n): list(kept) for n, kept in by.items()} for i, by in sets.items()}
    return {"version": _VERSION, "layers": layers}


def write_sets(sets: Mapping[int, Mapping[int, Kept]], path: Path) -> None:
    """Writes sets as JSON, whole or not at all."""
    write_text(path, json.dumps(_document(sets)))


def read_sets(path: Path, inventory: Inventory) -> Sets:
    """Reads what `write_sets` wrote.

    Raises:
        UserError: Not such a file, or sets that are none of this model.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        sets = {int(i): {int(n): tuple(kept) for n, kept in by.items()} for i, by in data["layers"].items()}
        if tuple(sets) != inventory.moe_layers or _document(sets) != data:
            raise ValueError(f"expected version {_VERSION} and layers {list(inventory.moe_layers)}")
        for layer, by in sets.items():
            for count, kept in by.items():
                _check(layer, count, kept, inventory)
    except MALFORMED as error:
        raise UserError(
            f"{path}: no table of expert sets of {inventory.name} ({type(error).__name__}: "
            f"{str(error)[:200]}); delete it and run the search again"
        ) from error
    return sets


def _check(layer: int, count: int, kept: tuple[Any, ...], inventory: Inventory) -> None:
    size = inventory.experts // inventory.groups
    if any(type(e) is not int or not 0 <= e < inventory.experts for e in kept) or len(kept) != count:
        raise ValueError(f"layer {layer}: {count} experts expected, got {list(kept)[:8]}")
    shares = {sum(e // size == g for e in kept) for g in range(inventory.groups)}
    if list(kept) != sorted(set(kept)) or len(shares) != 1:
        raise ValueError(f"layer {layer}: experts must be ascending and alike many per group")
