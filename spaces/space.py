"""What may vary: the parameters a sampler sets, and the candidate they mean.

Parameters: `form` (portable or ragged, where the runtime allows both), `kept`
and `top_k` for all layers of a portable candidate, `blk.N.kept`, `blk.N.top_k`
for each layer of a ragged one, `blk.N.criterion` (which ranking the kept
experts come from, or the table of sets), and one type per quantizable tensor
under its GGUF name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json

from spaces.candidate import Candidate, MoeLayer
from spaces.errors import UserError, unknown
from spaces.inventory import Inventory, Tensor
from spaces.quant_types import fitting, ladder
from spaces.runtimes import RUNTIMES

PORTABLE, RAGGED = "portable", "ragged"
SET = "set"
"""The criterion that takes the kept experts from `Space.sets`."""

_STEPS = 16  # expert counts vary in sixteenths of the model's


def pick(order: tuple[int, ...], count: int, groups: int) -> tuple[int, ...]:
    """The `count` most important experts, as many from each group, ascending.

    Args:
        order: All experts, most important first.
        count: Experts to keep, a multiple of `groups`.
        groups: Groups of group-limited routing.
    """
    size, each = len(order) // groups, count // groups
    chosen: list[int] = []
    for group in range(groups):
        chosen += [e for e in order if e // size == group][:each]
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class Space:
    """Inventory, runtime and expert rankings, as a search space.

    Attributes:
        inventory: The model that is searched.
        rankings: criterion -> layer -> experts, most important first.
        runtime: Name in `spaces.runtimes.RUNTIMES`.
        types: The only types to choose from; () for all.
        sets: layer -> count -> experts chosen together, ascending; with {} there is no such criterion.
    """

    inventory: Inventory
    rankings: Mapping[str, Mapping[int, tuple[int, ...]]]
    runtime: str = "any"
    types: tuple[str, ...] = ()
    sets: Mapping[int, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise unknown("--runtime", self.runtime, RUNTIMES)
        for layer in self.inventory.moe_layers if self.sets else ():
            for kept in self.kept_options:
                if kept < self.inventory.experts and kept not in self.sets.get(layer, ()):
                    raise UserError(f"expert sets: none of {kept} experts in layer {layer}; make them anew")

    @cached_property
    def criteria(self) -> tuple[str, ...]:
        """The rankings, and the table of sets after them where there is one."""
        return (*self.rankings, SET) if self.sets else tuple(self.rankings)

    @cached_property
    def forms(self) -> tuple[str, ...]:
        """Portable alone, or both forms, as the runtime can."""
        return (PORTABLE, RAGGED) if RUNTIMES[self.runtime].ragged else (PORTABLE,)

    @cached_property
    def kept_options(self) -> tuple[int, ...]:
        """Expert counts, fewest first: sixteenths, whole per group, never below the model's top-k."""
        experts, groups = self.inventory.experts, self.inventory.groups
        # The groups that a token may use have to hold as many experts as it takes.
        per_group = max(
            self.inventory.least_per_group, -(-self.inventory.top_k // self.inventory.groups_used)
        )
        least = min(experts, max(self.inventory.top_k, experts // 4, per_group * groups))
        counts = {round(experts * s / _STEPS / groups) * groups for s in range(1, _STEPS + 1)}
        return tuple(sorted(n for n in counts if least <= n <= experts))

    def ladder(self, tensor: Tensor) -> tuple[str, ...]:
        """Types a tensor may take, fewest bits first."""
        return ladder(tensor.row, self.types)

    def nearest(self, tensor: Tensor, type_name: str) -> str:
        """`type_name`, what llama-quantize falls back to, or the tensor's type of the nearest size."""
        wanted, steps = fitting(type_name, tensor.row), self.ladder(tensor)
        if wanted in steps:
            return wanted
        return min(steps, key=lambda t: abs(tensor.bytes(t) - tensor.bytes(wanted)))

    @cached_property
    def top_k_options(self) -> tuple[int, ...]:
        return tuple(range(1, self.inventory.top_k + 1))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter with its choices; the same for every trial of a study."""
        out: dict[str, BaseDistribution] = {
            "form": CategoricalDistribution(self.forms),
            "kept": CategoricalDistribution(self.kept_options),
            "top_k": CategoricalDistribution(self.top_k_options),
        }
        for layer in self.inventory.moe_layers:
            if RAGGED in self.forms:
                out[f"blk.{layer}.kept"] = CategoricalDistribution(self.kept_options)
                out[f"blk.{layer}.top_k"] = CategoricalDistribution(self.top_k_options)
            out[f"blk.{layer}.criterion"] = CategoricalDistribution(self.criteria)
        for tensor in self.inventory.quantizable:
            out[tensor.name] = CategoricalDistribution(self.ladder(tensor))
        return out

    @cached_property
    def digest(self) -> str:
        """Names the space: a study may not go on in another one."""
        text = json.dumps({k: distribution_to_json(d) for k, d in self.distributions.items()}, sort_keys=True)
        ranks = json.dumps({c: {str(k): v for k, v in r.items()} for c, r in self.rankings.items()})
        sets = json.dumps({str(k): v for k, v in self.sets.items()}) if self.sets else ""
        return hashlib.sha256((text + ranks + sets).encode()).hexdigest()[:16]

    @cached_property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of portable and ragged candidates."""
        import math

        layers = len(self.inventory.moe_layers)
        types = sum(math.log10(len(self.ladder(t))) for t in self.inventory.quantizable)
        per_layer = math.log10(len(self.kept_options) * len(self.top_k_options) * len(self.criteria))
        return types + (per_layer * layers if RAGGED in self.forms else per_layer)

    def layer_choice(self, params: Mapping[str, Any], layer: int) -> tuple[int, int]:
        """(experts kept, top-k) of a layer."""
        prefix = f"blk.{layer}." if params["form"] == RAGGED else ""
        return int(params[f"{prefix}kept"]), int(params[f"{prefix}top_k"])

    def experts(self, layer: int, kept: int, criterion: str) -> tuple[int, ...]:
        """The experts that stay in a layer."""
        if criterion == SET:
            whole = self.inventory.experts
            return tuple(range(whole)) if kept == whole else self.sets[layer][kept]
        return pick(self.rankings[criterion][layer], kept, self.inventory.groups)

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate that a full set of parameters means."""
        layers = []
        for layer in self.inventory.moe_layers:
            kept, top_k = self.layer_choice(params, layer)
            experts = self.experts(layer, kept, params[f"blk.{layer}.criterion"])
            layers.append(MoeLayer(layer, experts, min(top_k, kept)))
        types = tuple((t.name, str(params[t.name])) for t in self.inventory.quantizable)
        return Candidate(tuple(layers), types)

    def params(
        self,
        types: Mapping[str, str],
        kept: int | Mapping[int, int],
        criterion: str | Mapping[int, str],
        top_k: int | Mapping[int, int] | None = None,
    ) -> dict[str, Any]:
        """A full set of parameters; an int is a portable count, a mapping one count per layer.

        Parameters the form does not read take the value nearest to what it does read,
        so that a candidate has one spelling only.
        """
        layers = self.inventory.moe_layers
        top_k = self.inventory.top_k if top_k is None else top_k
        ragged = not isinstance(kept, int) or not isinstance(top_k, int)
        counts = kept if not isinstance(kept, int) else dict.fromkeys(layers, kept)
        ks = top_k if not isinstance(top_k, int) else dict.fromkeys(layers, top_k)
        ragged = ragged and (len(set(counts.values())) > 1 or len(set(ks.values())) > 1)
        out: dict[str, Any] = {
            "form": RAGGED if ragged else PORTABLE,
            "kept": counts[layers[0]],
            "top_k": ks[layers[0]],
        }
        for layer in layers:
            if RAGGED in self.forms:
                out[f"blk.{layer}.kept"] = counts[layer]
                out[f"blk.{layer}.top_k"] = ks[layer]
            out[f"blk.{layer}.criterion"] = criterion if isinstance(criterion, str) else criterion[layer]
        return out | {t.name: types[t.name] for t in self.inventory.quantizable}
